//! `whimbrel rescue`: what is to be done when one side of a postcopy is gone for good.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};
use whimbrel::rescue::{self, How, Joined, Lost, Part};
use whimbrel_control::{Client, Endpoint};

use crate::failure::Failure;
use crate::monitor::{FILL, RESCUE};
use crate::progress::mib;

/// How long a side may take to write or to read all of its guest's RAM.
const LONG: Duration = Duration::from_secs(24 * 3600);

/// Bring back a guest of which one side of a postcopy is gone for good.
#[derive(Debug, Args)]
pub(crate) struct Rescue {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    Keep(Keep),
    Join(Join),
    Fill(Fill),
    RollBack(RollBack),
}

/// Have a side that is paused in postcopy keep what it has, with a map of what is missing. A
/// destination's guest is stopped, and does not run there again
#[derive(Debug, Args)]
struct Keep {
    /// QMP of the whimbrel that still lives: unix:PATH or tcp:HOST:PORT
    qmp: Endpoint,
    /// The file to keep it in
    file: PathBuf,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Make a whole VM of two parts, to be restored with 'whimbrel restore'
#[derive(Debug, Args)]
struct Join {
    /// What the destination has kept
    destination: PathBuf,
    /// What the source has kept, or the file that was its memory (--memory-path)
    source: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
    /// What becomes of pages that are in neither part
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    lost: WhatIsLost,
    /// Join them though hardly a page is the same in both, as if they were of different VMs
    #[arg(long)]
    unlike: bool,
}

/// Bring a destination that is paused in postcopy what it lacks; its guest runs meanwhile
#[derive(Debug, Args)]
struct Fill {
    /// QMP of the destination: unix:PATH or tcp:HOST:PORT
    qmp: Endpoint,
    /// What the source has kept, or the file that was its memory (--memory-path); it must be there
    /// on the destination's host
    source: Option<PathBuf>,
    /// What becomes of pages that are not there either
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    lost: WhatIsLost,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

/// Make a whole VM of what the source has kept alone: the guest as it was when it was handed over.
/// What it has done since at the destination is undone, but not what it wrote to disks or sent
#[derive(Debug, Args)]
struct RollBack {
    /// What the source has kept
    source: PathBuf,
    #[command(flatten)]
    output: Output,
}

/// Where what is made goes.
#[derive(Debug, Args)]
struct Output {
    /// The file to make
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Print one JSON object at the end
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum WhatIsLost {
    /// Nothing is done without them
    #[default]
    Refuse,
    /// They are given up: a guest that touches one takes a machine check
    Poison,
}

impl WhatIsLost {
    fn name(self) -> &'static str {
        match self {
            WhatIsLost::Refuse => "refuse",
            WhatIsLost::Poison => "poison",
        }
    }

    fn lost(self) -> Lost {
        match self {
            WhatIsLost::Refuse => Lost::Refuse,
            WhatIsLost::Poison => Lost::Poison,
        }
    }
}

impl Rescue {
    pub(crate) fn run(self) -> Result<(), Failure> {
        match self.what {
            What::Keep(keep) => keep.run(),
            What::Join(join) => join.run(),
            What::Fill(fill) => fill.run(),
            What::RollBack(back) => back.run(),
        }
    }
}

impl Keep {
    fn run(self) -> Result<(), Failure> {
        let file = absolute(&self.file)?;
        let mut side = Client::connect(self.qmp, LONG)?;
        let kept = side.execute(RESCUE, json!({ "file": file }))?;
        if self.json {
            println!("{kept}");
            return Ok(());
        }
        let (ram, missing) = (number(&kept, "ram-bytes"), number(&kept, "missing-pages"));
        let side = kept["side"].as_str().unwrap_or_default();
        println!(
            "kept what the {side} had in {}: {} of RAM, {} of it missing",
            self.file.display(),
            mib(ram),
            mib(missing * 4096)
        );
        Ok(())
    }
}

impl Join {
    fn run(self) -> Result<(), Failure> {
        let destination = Part::open(&self.destination)?;
        let source = self.source.as_deref().map(Part::open).transpose()?;
        let how = How { lost: self.lost.lost(), unlike_too: self.unlike };
        let joined = rescue::join(&destination, source.as_ref(), how, &self.output.output)?;
        self.output.tell(&joined);
        Ok(())
    }
}

impl Fill {
    fn run(self) -> Result<(), Failure> {
        let mut arguments = json!({ "lost": self.lost.name() });
        if let Some(source) = &self.source {
            arguments["file"] = absolute(source)?.into();
        }
        let mut destination = Client::connect(self.qmp, LONG)?;
        let filled = destination.execute(FILL, arguments)?;
        if self.json {
            println!("{filled}");
            return Ok(());
        }
        let (pages, lost) = (number(&filled, "pages"), number(&filled, "lost-pages"));
        println!(
            "filled {} with {} of RAM; {}",
            destination.endpoint(),
            mib(pages * 4096),
            told_of_lost(lost)
        );
        Ok(())
    }
}

impl RollBack {
    fn run(self) -> Result<(), Failure> {
        let joined = rescue::roll_back(&Part::open(&self.source)?, &self.output.output)?;
        self.output.tell(&joined);
        Ok(())
    }
}

impl Output {
    fn tell(&self, joined: &Joined) {
        let file = self.output.display();
        if self.json {
            let report = json!({
                "file": file.to_string(),
                "machine": joined.machine,
                "ram-bytes": joined.ram_bytes,
                "stored-bytes": joined.stored_bytes,
                "pages-taken": joined.pages_taken,
                "lost-pages": joined.lost_pages,
            });
            println!("{report}");
            return;
        }
        println!(
            "made {file}: machine {}, {} of RAM ({} taken from the source's part); {}",
            joined.machine,
            mib(joined.ram_bytes),
            mib(joined.pages_taken * 4096),
            told_of_lost(joined.lost_pages)
        );
    }
}

fn told_of_lost(pages: u64) -> String {
    match pages {
        0 => "nothing is lost".into(),
        pages => format!("{} are lost, and given up", mib(pages * 4096)),
    }
}

fn number(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or(0)
}

/// For a process that works in another folder.
fn absolute(path: &Path) -> Result<String, Failure> {
    let path = std::path::absolute(path)?;
    let text = path.to_str().ok_or_else(|| {
        Failure::new(format!("{}: QMP has no words for names that are no text", path.display()))
    })?;
    Ok(text.into())
}

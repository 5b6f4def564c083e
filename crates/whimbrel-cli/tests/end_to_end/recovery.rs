//! `whimbrel migrate` and a link that breaks in postcopy: two sides that play a part, told through
//! QMP alone what to do.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;
use whimbrel::{
    Address, AutoRecover, Capabilities, Capability, MigrationInfo, MigrationStats, MigrationStatus,
    Parameters, RunState, SocketAddressInfo,
};
use whimbrel_control::{
    Backend, Endpoint, EventListener, ParameterChange, QmpError, Server, Subscription,
};

use crate::process::{Ended, folder, whimbrel};

use MigrationStatus::{Completed, PostcopyActive, PostcopyPaused};

/// What becomes of the link once the guest has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Break {
    /// Both sides notice, and wait.
    ForBoth,
    /// The source notices, the destination does not.
    ForSource,
    /// The destination notices, the source does not.
    ForDestination,
    /// Both do, and go on by themselves after a moment.
    ForAMoment,
    /// Behind the last page: only the source has something left to wait for.
    AtTheEnd,
}

/// A migration without guest or link.
#[derive(Debug)]
struct Play {
    link: Break,
    /// Whether the destination refuses to wait once more.
    refuses: bool,
    broken: Option<Instant>,
    source: MigrationStatus,
    destination: MigrationStatus,
    /// Where the destination waits.
    port: u16,
    said: Vec<String>,
}

impl Play {
    fn new(link: Break) -> Play {
        Play {
            link,
            refuses: false,
            broken: None,
            source: MigrationStatus::None,
            destination: MigrationStatus::None,
            port: 0,
            said: Vec::new(),
        }
    }

    /// Breaks the link as soon as the guest has left.
    fn leave(&mut self) {
        self.broken = Some(Instant::now());
        (self.source, self.destination) = match self.link {
            Break::ForBoth | Break::ForAMoment => (PostcopyPaused, PostcopyPaused),
            Break::ForSource => (PostcopyPaused, PostcopyActive),
            Break::ForDestination => (PostcopyActive, PostcopyPaused),
            Break::AtTheEnd => (PostcopyPaused, Completed),
        };
    }

    /// What happens by itself.
    fn go_on(&mut self) {
        let moment = Duration::from_millis(500);
        if self.link == Break::ForAMoment && self.broken.is_some_and(|at| at.elapsed() > moment) {
            (self.source, self.destination) = (Completed, Completed);
        }
    }
}

/// One side of it.
struct Side {
    play: Arc<Mutex<Play>>,
    is_source: bool,
    parameters: Mutex<Parameters>,
}

impl Side {
    fn say(&self, what: String) {
        self.play.lock().expect("the play").said.push(what);
    }
}

impl Backend for Side {
    fn run_state(&self) -> RunState {
        RunState::Running
    }

    fn stop(&self) -> Result<(), QmpError> {
        Ok(())
    }

    fn cont(&self) -> Result<(), QmpError> {
        Ok(())
    }

    fn quit(&self) {}

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn set_capabilities(&self, _: &[(Capability, bool)]) -> Result<(), QmpError> {
        Ok(())
    }

    fn parameters(&self) -> Parameters {
        self.parameters.lock().expect("parameters").clone()
    }

    fn update_parameters(&self, change: ParameterChange<'_>) -> Result<(), QmpError> {
        change(&mut self.parameters.lock().expect("parameters"))
    }

    fn migrate(&self, _: Address) -> Result<(), QmpError> {
        let mut play = self.play.lock().expect("the play");
        (play.source, play.destination) = (MigrationStatus::Active, MigrationStatus::Active);
        Ok(())
    }

    fn migrate_resume(&self, destination: Address) -> Result<(), QmpError> {
        self.say(format!("resume to {destination}"));
        let mut play = self.play.lock().expect("the play");
        let there = Address::Tcp { host: "127.0.0.1".into(), port: play.port };
        if (play.source, play.destination) != (PostcopyPaused, PostcopyPaused) {
            return Err(QmpError::generic("Cannot resume if there is no paused migration"));
        }
        if destination == there {
            (play.source, play.destination) = (Completed, Completed);
        }
        Ok(())
    }

    fn migrate_recover(&self, source: Address) -> Result<(), QmpError> {
        self.say(format!("recover at {source}"));
        let mut play = self.play.lock().expect("the play");
        if play.refuses {
            return Err(QmpError::generic("no port is left"));
        }
        if play.destination != PostcopyPaused {
            return Err(QmpError::generic("Migrate recover can only be run when paused"));
        }
        play.port = match source {
            Address::Tcp { port, .. } if port != 0 => port,
            _ => 7777,
        };
        Ok(())
    }

    fn migrate_incoming(&self, _: Address, _: bool) -> Result<(), QmpError> {
        self.play.lock().expect("the play").port = 4444;
        Ok(())
    }

    fn migrate_cancel(&self) -> Result<(), QmpError> {
        self.say("cancel".into());
        Ok(())
    }

    fn migrate_start_postcopy(&self) -> Result<(), QmpError> {
        self.play.lock().expect("the play").leave();
        Ok(())
    }

    fn migrate_pause(&self) -> Result<(), QmpError> {
        let mut play = self.play.lock().expect("the play");
        let (whose, status) = match self.is_source {
            true => ("source", &mut play.source),
            false => ("destination", &mut play.destination),
        };
        *status = PostcopyPaused;
        play.said.push(format!("pause the {whose}"));
        Ok(())
    }

    fn yank(&self) -> Result<(), QmpError> {
        Ok(())
    }

    fn migrate_continue(&self, _: MigrationStatus) -> Result<(), QmpError> {
        Ok(())
    }

    fn migration_info(&self) -> MigrationInfo {
        let mut play = self.play.lock().expect("the play");
        play.go_on();
        let ram = MigrationStats { remaining: 3 << 20, ..MigrationStats::default() };
        let place =
            SocketAddressInfo::Inet { host: "127.0.0.1".into(), port: play.port.to_string() };
        match self.is_source {
            true => MigrationInfo {
                status: Some(play.source),
                ram: Some(ram),
                error_desc: (play.source == PostcopyPaused).then(|| "the cable is out".into()),
                ..MigrationInfo::default()
            },
            false => MigrationInfo {
                status: Some(play.destination),
                socket_address: Some(vec![place]),
                ..MigrationInfo::default()
            },
        }
    }

    fn subscribe(&self, _: EventListener) -> Subscription {
        Subscription::new(|| {})
    }
}

/// Both sides, served.
struct Stage {
    play: Arc<Mutex<Play>>,
    servers: Vec<Server>,
    _folder: TempDir,
}

impl Stage {
    fn new(play: Play, auto_recover: AutoRecover) -> Stage {
        let (folder, play) = (folder(), Arc::new(Mutex::new(play)));
        let servers = ["source", "destination"].map(|name| {
            let parameters = Mutex::new(Parameters { auto_recover, ..Parameters::default() });
            let side = Side { play: play.clone(), is_source: name == "source", parameters };
            let endpoint = Endpoint::Unix(folder.path().join(name));
            Server::bind(endpoint, Arc::new(side)).expect("a socket")
        });
        Stage { play, servers: servers.into(), _folder: folder }
    }

    /// Has `whimbrel migrate` drive it.
    fn drive(&self, options: &[&str]) -> Ended {
        let at: Vec<String> = self.servers.iter().map(|s| s.endpoint().to_string()).collect();
        let command = ["migrate", &at[0], &at[1], "--postcopy", "--postcopy-after=0", "--json"];
        whimbrel(&[&command[..], options].concat())
    }

    fn said(&self) -> Vec<String> {
        self.play.lock().expect("the play").said.clone()
    }
}

fn expect_completed(ended: Ended, what: &str) {
    let report: Value = serde_json::from_str(&ended.expect_success(what)).expect("JSON");
    assert_eq!(report["status"], "completed", "{what}: {report}");
}

#[test]
fn both_sides_are_told_to_go_on() {
    for (link, options, said) in [
        (
            Break::ForBoth,
            &[][..],
            &["recover at tcp:127.0.0.1:0", "resume to tcp:127.0.0.1:7777"][..],
        ),
        (
            Break::ForBoth,
            &["--recover=tcp:10.9.8.7:5555"],
            &["recover at tcp:10.9.8.7:5555", "resume to tcp:127.0.0.1:5555"],
        ),
        (
            Break::ForSource,
            &[],
            &[
                "pause the destination",
                "recover at tcp:127.0.0.1:0",
                "resume to tcp:127.0.0.1:7777",
            ],
        ),
        (
            Break::ForDestination,
            &[],
            &["pause the source", "recover at tcp:127.0.0.1:0", "resume to tcp:127.0.0.1:7777"],
        ),
    ] {
        let what = format!("{link:?} {options:?}");
        let stage = Stage::new(Play::new(link), AutoRecover::Off);
        let ended = stage.drive(options);
        assert!(ended.err.contains("link lost, recovering for 0 s: the source is "), "{ended:?}");
        expect_completed(ended, &what);
        assert_eq!(stage.said(), said, "{what}");
    }
}

#[test]
fn sides_that_go_on_by_themselves_are_waited_for() {
    let stage = Stage::new(Play::new(Break::ForAMoment), AutoRecover::Auto);
    expect_completed(stage.drive(&[]), "by themselves");
    assert_eq!(stage.said(), [""; 0]);
    // Unless it was said where.
    let stage = Stage::new(Play::new(Break::ForBoth), AutoRecover::Auto);
    expect_completed(stage.drive(&["--recover=unix:/run/again"]), "told where");
    assert_eq!(stage.said(), ["recover at unix:/run/again", "resume to tcp:127.0.0.1:7777"]);
}

#[test]
fn what_stays_paused_is_told_in_one_line_with_what_is_missing() {
    const BROKE: &str = "the migration broke in postcopy, with the guest at the destination and 3 MiB \
                         of its RAM still at the source: the source says postcopy-paused (the cable \
                         is out); the destination says postcopy-paused; ";
    const NEEDS: &str = "the destination needs 'migrate-recover' with an address; the source needs \
                         'migrate' with 'resume' to where the destination waits";
    let stage = Stage::new(Play::new(Break::ForBoth), AutoRecover::Auto);
    stage.drive(&["--no-recover"]).expect_line("left alone", &[BROKE, NEEDS]);
    assert_eq!(stage.said(), [""; 0]);

    let stage = Stage::new(Play::new(Break::ForBoth), AutoRecover::Auto);
    stage.drive(&["--recover-time-limit=1"]).expect_line("too late", &[BROKE, NEEDS]);
    assert_eq!(stage.said(), [""; 0]);

    let stage = Stage::new(Play { refuses: true, ..Play::new(Break::ForBoth) }, AutoRecover::Off);
    let refused = "migrate-recover was refused: no port is left";
    stage.drive(&["--recover-time-limit=1"]).expect_line("refused", &[BROKE, NEEDS, refused]);
    assert_eq!(stage.said()[0], "recover at tcp:127.0.0.1:0");
}

#[test]
fn a_guest_that_is_whole_is_not_called_broken() {
    let stage = Stage::new(Play::new(Break::AtTheEnd), AutoRecover::Off);
    let texts = ["the guest is whole at the destination", "the source", "all that is left to do"];
    let line = stage.drive(&[]).expect_line("whole", &texts);
    assert!(!line.contains("broke"), "{line}");
    assert_eq!(stage.said(), [""; 0]);
}

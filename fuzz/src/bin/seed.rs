//! Writes the seeds of every fuzz target, and the corpus that is kept, to `corpus/<target>/`, where
//! cargo-fuzz looks for them.

use std::fs;
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (target, _) in whimbrel_fuzz::TARGETS {
        fs::create_dir_all(corpus.join(target))?;
    }
    let seeds = whimbrel_fuzz::seeds::all()?;
    for (number, (target, name, bytes)) in seeds.iter().enumerate() {
        fs::write(corpus.join(target).join(format!("{name}-{number}")), bytes)?;
    }
    for (target, _) in whimbrel_fuzz::TARGETS {
        for (number, input) in whimbrel_fuzz::corpus::read(target)?.iter().enumerate() {
            fs::write(corpus.join(target).join(format!("kept-{number}")), input)?;
        }
    }
    println!("{} seeds in {}", seeds.len(), corpus.display());
    Ok(())
}

//! Keeps the corpus of each target named, as it lies in `corpus/<target>/`, in the repository.

use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for target in std::env::args().skip(1) {
        let (inputs, bytes) = whimbrel_fuzz::corpus::keep(&target, &corpus.join(&target))?;
        println!("{target}: {inputs} inputs in {bytes} bytes");
    }
    Ok(())
}

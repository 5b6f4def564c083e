//! placeholder
use crate::failure::Failure;
use clap::Args;
/// Show what a file holds.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    file: std::path::PathBuf,
}
impl Inspect {
    pub(crate) fn run(self) -> Result<(), Failure> {
        Err(Failure::new(format!("{}", self.file.display())))
    }
}

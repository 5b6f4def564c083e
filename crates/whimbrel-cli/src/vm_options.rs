//! The options that say what VM to run, shared by `vm` and `demo`.

use std::path::PathBuf;

use clap::Args;
use whimbrel_ram::PageSize;
use whimbrel_vm::{
    AccelChoice, Config, DirtyKind, Fill, SerialOutput, Workload, parse_page_size, parse_size,
};

/// What VM to run.
#[derive(Clone, Debug, Args)]
pub(crate) struct VmOptions {
    /// The guest's memory: bytes, or with k, M, G
    #[arg(long, default_value = "256M", value_parser = parse_size, value_name = "SIZE")]
    pub(crate) memory: u64,
    /// What runs the vCPUs: kvm, native or auto
    #[arg(long, default_value = "auto")]
    pub(crate) accel: AccelChoice,
    /// How many vCPUs, 1 to 8
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) vcpus: u32,
    /// The host pages behind the memory: 4k, 2M or 1G
    #[arg(long, default_value = "4k", value_parser = parse_page_size, value_name = "SIZE")]
    pub(crate) page_size: PageSize,
    /// What the guest does: KIND,seed=N,working-set=SIZE,rate=N, all but KIND optional: KIND is idle,
    /// sequential, uniform, zipf or hot-cold, and rate is page updates a second on each vCPU
    /// (0: as many as it can)
    #[arg(long, default_value = "uniform,rate=2000")]
    pub(crate) workload: Workload,
    /// What the memory outside the working set holds: zero, random or file:PATH
    #[arg(long, default_value = "zero")]
    pub(crate) fill: Fill,
    /// How written pages are found: auto, kvm-log, kvm-ring, pagemap-scan or own-writes
    #[arg(long, default_value = "auto")]
    pub(crate) dirty: DirtyKind,
    /// Make the memory a memfd that other processes can map
    #[arg(long)]
    pub(crate) shared: bool,
    /// Have the memory in a new file, which outlives the process: what 'whimbrel rescue' needs should
    /// this VM be killed in postcopy
    #[arg(long, value_name = "FILE")]
    pub(crate) memory_path: Option<PathBuf>,
    /// Take every page from the host before the guest starts
    #[arg(long)]
    pub(crate) prefault: bool,
}

impl VmOptions {
    /// The VM's make-up; `incoming` when its guest comes from elsewhere.
    pub(crate) fn config(&self, incoming: bool, serial: SerialOutput) -> Config {
        Config {
            memory: self.memory,
            vcpus: self.vcpus,
            accel: self.accel,
            page_size: self.page_size,
            shared: self.shared,
            memory_path: self.memory_path.clone(),
            dirty: self.dirty,
            workload: self.workload,
            fill: self.fill.clone(),
            prefault: self.prefault,
            incoming,
            serial,
            uuid: None,
            network: None,
        }
    }

    /// The same options, for another process.
    pub(crate) fn to_arguments(&self) -> Vec<String> {
        let accel = match self.accel {
            AccelChoice::Auto => "auto",
            AccelChoice::Kvm => "kvm",
            AccelChoice::Native => "native",
        };
        let fill = match &self.fill {
            Fill::Zero => "zero".to_owned(),
            Fill::Random => "random".to_owned(),
            Fill::File(path) => format!("file:{}", path.display()),
        };
        let mut arguments = vec![
            format!("--memory={}", self.memory),
            format!("--accel={accel}"),
            format!("--vcpus={}", self.vcpus),
            format!("--page-size={}", self.page_size),
            format!("--workload={}", self.workload),
            format!("--fill={fill}"),
            format!("--dirty={}", self.dirty.name()),
        ];
        if self.shared {
            arguments.push("--shared".into());
        }
        if let Some(path) = &self.memory_path {
            arguments.push(format!("--memory-path={}", path.display()));
        }
        if self.prefault {
            arguments.push("--prefault".into());
        }
        arguments
    }
}

//! Opening a kept VM's file: everything is checked before anything of it is used.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use whimbrel_ram::dirty::DirtyBits;
use whimbrel_ram::{GuestRam, RamBlock, TargetPage};
use whimbrel_wire::{
    BlockInfo, BlockList, Command, Configuration, Decoded, DeviceSection, DeviceState, FileHeader,
    MainDecoder, MainOptions, MappedRamHeader, RamRecord, page_bitmap as bitmap,
};

use super::writing::kept_error;
use crate::error::Error;
use crate::rescue::part;

/// How much is read at once where no pages are.
const CHUNK: usize = 64 << 10;

/// A VM that was kept, by whimbrel or by a QEMU: RAM is mapped from its file.
#[derive(Debug)]
pub struct KeptVm {
    pub(super) path: PathBuf,
    pub(crate) configuration: Configuration,
    pub(crate) early: Vec<DeviceSection>,
    pub(super) ram: GuestRam,
    /// One bitmap a block: pages that are not zero.
    pub(super) present: Arc<[Vec<u8>]>,
    pub(crate) devices: DeviceState,
}

impl KeptVm {
    /// Opens the file at `path`.
    pub fn open(path: &Path) -> Result<KeptVm, Error> {
        let file =
            File::open(path).map_err(|error| kept_error(path, "cannot be opened", &error))?;
        let mut magic = [0; 4];
        if file.read_exact_at(&mut magic, 0).is_ok() && magic == part::MAGIC {
            let reason = "it is only a part of a VM, of which pages are missing: 'whimbrel rescue \
                          join' makes a whole one of two parts";
            return Err(Error::Kept { path: path.into(), reason: reason.into() });
        }
        Opening::new(path, file)?.read()
    }

    /// Opens a part of a VM, the stream of which ends at byte `end` of its file.
    pub(crate) fn open_part(path: &Path, file: File, end: u64) -> Result<KeptVm, Error> {
        let mut opening = Opening::new(path, file)?;
        opening.file_len = end;
        opening.is_part = true;
        opening.read()
    }

    /// The machine type's full name.
    pub fn machine(&self) -> String {
        self.configuration.machine.to_string()
    }

    /// Bytes of RAM, all blocks together.
    pub fn ram_bytes(&self) -> u64 {
        self.ram.total_bytes()
    }

    /// RAM, mapped from the file. Pages that [`is_present`](KeptVm::is_present) denies are zero,
    /// whatever the mapping holds.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The name of the largest RAM block: the one that a VMM backs with huge pages.
    pub fn largest_block(&self) -> &str {
        let largest = self.ram.blocks().max_by_key(|(_, block)| block.len());
        largest.map_or("", |(_, block)| block.name())
    }

    /// Whether a page's content is in the file; it is zero otherwise.
    pub fn is_present(
        &self,
        block: whimbrel_ram::BlockIndex,
        page: whimbrel_ram::TargetPage,
    ) -> bool {
        bitmap::is_set(&self.present[block.index()], page.0)
    }

    /// The pages that are not zero.
    pub(super) fn content(&self) -> DirtyBits {
        let mut content = DirtyBits::none(&self.ram);
        for (index, block) in self.ram.blocks() {
            for page in (0..block.target_pages()).map(TargetPage) {
                if self.is_present(index, page) {
                    content.insert(index, page, 1);
                }
            }
        }
        content
    }
}

struct Opening<'p> {
    path: &'p Path,
    file: File,
    /// The file ends here, or what is in it that is a kept VM.
    file_len: u64,
    /// It begins with another magic than a kept VM.
    is_part: bool,
    decoder: MainDecoder,
    buffer: Vec<u8>,
    configuration: Option<Configuration>,
    early: Vec<DeviceSection>,
    own: Vec<DeviceSection>,
    blocks: Option<Arc<BlockList>>,
}

impl<'p> Opening<'p> {
    fn new(path: &'p Path, file: File) -> Result<Opening<'p>, Error> {
        let metadata = file.metadata().map_err(|e| kept_error(path, "cannot be read", &e))?;
        Ok(Opening {
            path,
            file,
            file_len: metadata.len(),
            is_part: false,
            decoder: MainDecoder::new(MainOptions::default()),
            buffer: Vec::new(),
            configuration: None,
            early: Vec::new(),
            own: Vec::new(),
            blocks: None,
        })
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Kept { path: PathBuf::from(self.path), reason: reason.into() }
    }

    fn read(mut self) -> Result<KeptVm, Error> {
        let mut complete = None;
        loop {
            let (used, decoded) = self
                .decoder
                .decode(&self.buffer)
                .map_err(|source| self.error(source.to_string()))?;
            self.buffer.drain(..used);
            match decoded {
                Decoded::NeedMore(_) => {
                    let seen_it_all = used == 0 || self.buffer.is_empty();
                    if seen_it_all && self.fill()? == 0 {
                        break;
                    }
                }
                Decoded::DeviceState(state) => complete = Some(*state),
                Decoded::Eof => complete = Some(self.own_devices(None)),
                Decoded::VmDescription(json) => complete = Some(self.own_devices(Some(json))),
                other => self.message(other)?,
            }
        }
        let devices = complete.ok_or_else(|| {
            self.error(format!(
                "byte {}: the file ends here, and the devices are not complete: it is cut off",
                self.decoder.offset()
            ))
        })?;
        self.finish(devices)
    }

    fn own_devices(&mut self, vmdesc: Option<Vec<u8>>) -> DeviceState {
        DeviceState { sections: self.own.clone(), commands: Vec::new(), vmdesc }
    }

    fn fill(&mut self) -> Result<usize, Error> {
        let mut chunk = [0; CHUNK];
        let mut read = || {
            let at = self.file.stream_position()?;
            let most = self.file_len.saturating_sub(at).min(CHUNK as u64);
            let bytes = self.file.read(&mut chunk[..usize::try_from(most).expect("a chunk")])?;
            Ok((at, bytes))
        };
        let (at, bytes) =
            read().map_err(|error| kept_error(self.path, "cannot be read", &error))?;
        if self.is_part && at == 0 && bytes >= part::MAGIC.len() {
            let mut header = Vec::new();
            FileHeader.encode(&mut header);
            chunk[..part::MAGIC.len()].copy_from_slice(&header[..part::MAGIC.len()]);
        }
        self.buffer.extend_from_slice(&chunk[..bytes]);
        Ok(bytes)
    }

    fn message(&mut self, message: Decoded) -> Result<(), Error> {
        match message {
            Decoded::Configuration(configuration) => self.configuration = Some(configuration),
            Decoded::DeviceSection(section) if self.blocks.is_some() => self.own.push(section),
            Decoded::DeviceSection(section) => self.early.push(section),
            Decoded::MappedBlock { skip, .. } => self.skip(skip)?,
            Decoded::RamSetup(blocks) => self.blocks = Some(blocks),
            Decoded::Ram(RamRecord::EndOfSection)
            | Decoded::Header(_)
            | Decoded::SectionStart(_)
            | Decoded::SectionPart(_)
            | Decoded::SectionEnd(_)
            | Decoded::Footer(_)
            | Decoded::DeviceStateBegins
            | Decoded::Command(
                Command::SwitchoverStart | Command::OpenReturnPath | Command::Ping(_),
            ) => {}
            Decoded::Ram(_) => {
                return Err(self.error(format!(
                    "byte {}: this is a recorded stream, not a kept VM: keep it first, with \
                     'whimbrel receive file:{} --store FILE'",
                    self.decoder.offset(),
                    self.path.display()
                )));
            }
            other => return Err(self.error(format!("{other:?} has no place in a kept VM"))),
        }
        Ok(())
    }

    /// Goes on behind a block's bitmap and pages.
    fn skip(&mut self, skip: u64) -> Result<(), Error> {
        let here = self.decoder.offset();
        let next = here.checked_add(skip).filter(|&next| next <= self.file_len);
        let next = next.ok_or_else(|| {
            self.error(format!("byte {here}: the file ends within a RAM block: it is cut off"))
        })?;
        self.buffer.clear();
        self.file
            .seek(SeekFrom::Start(next))
            .map_err(|error| kept_error(self.path, "cannot be read", &error))?;
        self.decoder.payload_taken(skip);
        Ok(())
    }

    fn finish(mut self, devices: DeviceState) -> Result<KeptVm, Error> {
        let blocks = self.blocks.take().ok_or_else(|| self.error("it holds no RAM"))?;
        let configuration =
            self.configuration.take().ok_or_else(|| self.error("it names no machine type"))?;
        let mut present = Vec::with_capacity(blocks.len());
        let mut ram = Vec::with_capacity(blocks.len());
        for (_, info) in blocks.iter() {
            let Some(header) = info.mapped_ram else {
                return Err(self.error("it is a recorded stream, not a kept VM (mapped-ram)"));
            };
            present.push(self.bitmap(info, &header)?);
            let name = info.name.to_string();
            let file =
                self.file.try_clone().map_err(|e| kept_error(self.path, "cannot be read", &e))?;
            ram.push(RamBlock::private_file(
                &name,
                0,
                info.used_length,
                file,
                header.pages_offset,
            )?);
        }
        let ram = GuestRam::new(ram);
        let (path, present) = (self.path.into(), present.into());
        Ok(KeptVm { path, configuration, early: self.early, ram, present, devices })
    }

    fn bitmap(&mut self, info: &BlockInfo, header: &MappedRamHeader) -> Result<Vec<u8>, Error> {
        let bytes = bitmap::bitmap_len(info.used_length, self.decoder.target_page());
        let fits = header.bitmap_offset.checked_add(bytes).is_some_and(|end| end <= self.file_len);
        if !fits {
            return Err(self.error(format!("the bitmap of RAM block {} is cut off", info.name)));
        }
        let mut bits = vec![0; usize::try_from(bytes).expect("not longer than the file")];
        self.file
            .seek(SeekFrom::Start(header.bitmap_offset))
            .and_then(|_| self.file.read_exact(&mut bits))
            .map_err(|error| kept_error(self.path, "cannot be read", &error))?;
        let pages = info.used_length / header.page_size;
        let beyond = (pages..bytes * 8).find(|&page| bitmap::is_set(&bits, page));
        if let Some(page) = beyond {
            return Err(self.error(format!(
                "the bitmap of RAM block {} has page {page}, and the block has only {pages}",
                info.name
            )));
        }
        let last = (0..pages).rev().find(|&page| bitmap::is_set(&bits, page));
        let end = last.map_or(0, |page| header.pages_offset + (page + 1) * header.page_size);
        if end > self.file_len {
            return Err(self.error(format!("the pages of RAM block {} are cut off", info.name)));
        }
        Ok(bits)
    }
}

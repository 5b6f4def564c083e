//! The return path as the source's driver reads it: `source::answers` without its channel.

use whimbrel_ram::{BlockIndex, GuestRam};
use whimbrel_wire::{Name, ReturnDecoded, ReturnDecoder, ReturnMessage, TargetPage};

use crate::recovery::exchange::bitmap_words;

/// What the destination has said.
#[derive(Debug)]
pub(super) enum Heard {
    Pong,
    Request { block: Option<Name>, start: u64, len: u64 },
    Bitmap { block: BlockIndex, received: Vec<u64> },
    Resumed,
    Shut(u32),
}

#[derive(Debug)]
pub(super) struct Answers {
    decoder: ReturnDecoder,
    bitmap: Option<(BlockIndex, Vec<u8>, usize)>,
}

impl Answers {
    pub(super) fn new() -> Answers {
        Answers { decoder: ReturnDecoder::new(TargetPage::FOUR_KIB), bitmap: None }
    }

    /// Looks at what has come; gives how many bytes of it are done with, and what they were.
    pub(super) fn next(
        &mut self,
        ram: &GuestRam,
        input: &[u8],
    ) -> Result<(usize, Option<Heard>), String> {
        let mut used = 0;
        loop {
            if let Some((_, bytes, left)) = &mut self.bitmap
                && self.decoder.payload_left() > 0
            {
                let here = (*left).min(input.len() - used);
                bytes.extend_from_slice(&input[used..used + here]);
                (*left, used) = (*left - here, used + here);
                self.decoder.payload_taken(here as u64);
                if self.decoder.payload_left() > 0 {
                    return Ok((used, None));
                }
            }
            let (more, decoded) =
                self.decoder.decode(&input[used..]).map_err(|error| error.to_string())?;
            used += more;
            let heard = match decoded {
                ReturnDecoded::NeedMore(_) => return Ok((used, None)),
                ReturnDecoded::Message(ReturnMessage::RecvBitmap(name)) => {
                    let found = ram.find(name.as_str().unwrap_or_default());
                    let (block, _) = found.ok_or("a bitmap of no block")?;
                    self.bitmap = Some((block, Vec::new(), bitmap_words(ram, block) * 8));
                    continue;
                }
                ReturnDecoded::BitmapFollows { len } => match &self.bitmap {
                    Some((_, _, left)) if *left as u64 == len => continue,
                    _ => return Err("a bitmap of another length".into()),
                },
                ReturnDecoded::BitmapEnd => {
                    let (block, bytes, _) = self.bitmap.take().ok_or("the end of no bitmap")?;
                    let (words, _) = bytes.as_chunks();
                    let received = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
                    Heard::Bitmap { block, received }
                }
                ReturnDecoded::Message(ReturnMessage::Pong(_)) => Heard::Pong,
                ReturnDecoded::Message(ReturnMessage::Shut(value)) => Heard::Shut(value),
                ReturnDecoded::Message(ReturnMessage::ResumeAck(_)) => Heard::Resumed,
                ReturnDecoded::Message(ReturnMessage::RequestPagesOf { block, start, len }) => {
                    Heard::Request { block: Some(block), start: start.0, len: len.into() }
                }
                ReturnDecoded::Message(ReturnMessage::RequestPages { start, len }) => {
                    Heard::Request { block: None, start: start.0, len: len.into() }
                }
                ReturnDecoded::Message(ReturnMessage::SwitchoverAck) | ReturnDecoded::Colo(_) => {
                    return Err("words of another time".into());
                }
            };
            return Ok((used, Some(heard)));
        }
    }
}

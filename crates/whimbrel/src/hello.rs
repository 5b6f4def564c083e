//! How two whimbrels know each other, and what they then may do.
//!
//! The source sends a PING of a certain value early in the stream. A QEMU answers with the same
//! value, as it does to every PING; a whimbrel answers with another one, which says what it can.
//! Nothing that is not QEMU's protocol is done before such an answer has come.

/// The upper half of the value a source sends.
const QUESTION: u32 = 0x5748_0000;
/// The upper half of a whimbrel's answer.
const ANSWER: u32 = 0x5749_0000;
const LOWER: u32 = 0xffff;

/// The PING that a whimbrel answers when each multifd channel has ended the round behind which it goes
/// on in postcopy.
pub(crate) const PING_PARKED: u32 = 0x5041_524b;

/// The PONG by which a whimbrel says, unasked, that a package has come as a whole: from then on its
/// guest can be lost no more, whatever becomes of the link.
pub(crate) const PONG_PACKAGE: u32 = 0x5041_434b;

/// What a whimbrel can do beyond QEMU's protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features(u16);

impl Features {
    /// Pages of memory in huge pages are asked for, sent and placed in 4 KiB pieces.
    pub(crate) const SMALL_PIECES: Features = Features(1);
    /// A package is loaded, and that is said, before its last command (RUN) has come.
    pub(crate) const RUN_APART: Features = Features(2);

    /// Multifd channels go on in postcopy, behind one round more.
    pub(crate) const MULTIFD_GOES_ON: Features = Features(4);

    /// Each multifd packet is packed by whatever method it names.
    pub(crate) const ANY_METHOD: Features = Features(8);

    /// A postcopy whose link broke goes on by itself: the source has said what makes the migration
    /// itself, and says something on the main channel as often as it promised.
    pub(crate) const RECOVERS: Features = Features(16);

    /// In COLO, dirty pages come ahead of a checkpoint while the guest runs.
    pub(crate) const PAGES_AHEAD: Features = Features(32);

    /// What this version can do.
    pub(crate) const ALL: Features = Features(
        Features::SMALL_PIECES.0
            | Features::RUN_APART.0
            | Features::MULTIFD_GOES_ON.0
            | Features::ANY_METHOD.0
            | Features::RECOVERS.0
            | Features::PAGES_AHEAD.0,
    );

    /// What a destination can do whose RAM can, or cannot, be placed in small pieces.
    pub(crate) fn of_destination(small_pieces: bool) -> Features {
        let small = if small_pieces { 0 } else { Features::SMALL_PIECES.0 };
        Features(Features::ALL.0 & !small)
    }

    pub(crate) fn has(self, feature: Features) -> bool {
        self.0 & feature.0 == feature.0
    }

    /// What both can do.
    pub(crate) fn and(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }

    /// The PING by which a source asks.
    pub(crate) fn question(self) -> u32 {
        QUESTION | u32::from(self.0)
    }

    /// What the source of such a PING can do; `None` for any other PING.
    pub(crate) fn asked_by(ping: u32) -> Option<Features> {
        lower(ping, QUESTION)
    }

    /// The PONG by which a destination answers, where it and the source both can do `self`.
    pub(crate) fn answer(self) -> u32 {
        ANSWER | u32::from(self.0)
    }

    /// What was agreed on by such a PONG; `None` for any other PONG.
    pub(crate) fn agreed_by(pong: u32) -> Option<Features> {
        lower(pong, ANSWER)
    }
}

fn lower(value: u32, upper: u32) -> Option<Features> {
    (value & !LOWER == upper)
        .then(|| Features(u16::try_from(value & LOWER).expect("masked to 16 bits")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whimbrel_answers_and_a_qemu_echoes() {
        let ping = Features::ALL.question();
        let agreed = Features::asked_by(ping).unwrap().and(Features::SMALL_PIECES);
        assert_eq!(Features::agreed_by(agreed.answer()), Some(Features::SMALL_PIECES));
        assert_eq!(Features::agreed_by(ping), None, "an echo agrees on nothing");
        for other in [1, 2, 3, 4, 0x42, 0x4c4f_4144] {
            assert_eq!((Features::asked_by(other), Features::agreed_by(other)), (None, None));
        }
    }
}

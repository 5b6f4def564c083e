//! What channels are called in errors.

use std::sync::LazyLock;

/// The name of multifd channel `number`: `multifd 0` to `multifd 255`.
pub(crate) fn multifd(number: u8) -> &'static str {
    // Errors hold names that live for ever, and these are made once.
    static NAMES: LazyLock<Vec<&'static str>> = LazyLock::new(|| {
        (0..=u8::MAX)
            .map(|number| &*Box::leak(format!("multifd {number}").into_boxed_str()))
            .collect()
    });
    NAMES[usize::from(number)]
}

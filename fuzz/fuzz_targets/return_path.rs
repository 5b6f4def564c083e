#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| whimbrel_fuzz::limited(whimbrel_fuzz::return_path, data));

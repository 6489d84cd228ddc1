//! How much a test does.
//!
//! In: `VMM_TORTURE` in the environment, which `make torture` sets. Out: how often. Holds: a test says the same of few and of many.

/// So many: a sample, or under `make torture` the whole.
pub fn of(sample: usize, whole: usize) -> usize {
    if std::env::var_os("VMM_TORTURE").is_some() { whole } else { sample }
}

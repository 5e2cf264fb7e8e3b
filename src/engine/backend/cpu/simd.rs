//! Loops compiled twice: for any x86-64, and for AVX2, chosen at run time.
//!
//! Only the width of the registers differs. No multiply-add is fused that was not written so, hence the same bits.
#![expect(unsafe_code, reason = "a function compiled for AVX2 may only be called where the processor has it")]

/// Runs `body` compiled for the widest registers that this processor has. `body` must be small enough to be inlined.
#[inline(always)]
pub(super) fn vectorised<R>(body: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor was just asked and has AVX2.
        return unsafe { with_avx2(body) };
    }
    body()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<R>(body: impl FnOnce() -> R) -> R {
    body()
}

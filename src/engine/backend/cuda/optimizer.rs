//! AdamW of `trait Backend` on CUDA, with the constants and the random numbers of the CPU's.

use super::{
    super::{
        AdamW, DType, OptimizerState, Tensor,
        cpu::adamw::{Constants, key},
    },
    Cuda,
    elementwise::is_wide,
    kernels::Argument::{Count, Flag, Float, Pointer},
    operations::expect,
};
use crate::engine::Result;

/// Threads of a block in adamw.cu, and elements that one updates a turn.
const THREADS: u32 = 256;
const ELEMENTS_OF_A_THREAD: u64 = 4;

impl Cuda {
    /// `Backend::adamw`.
    pub fn adamw(&mut self, state: OptimizerState, g: Tensor, scale: Tensor, hyper: &AdamW) -> Result {
        let OptimizerState { w, low, m, v } = state;
        let n = w.elements();
        assert!([m, v, g].iter().all(|tensor| tensor.elements() == n), "elements of an update: {state:?}, {g:?}");
        assert_eq!(m.dtype, v.dtype, "both moments are stored alike");
        expect("scale", scale, DType::F32, 1, 1);
        let mut arguments = vec![Pointer(self.device.address(w))];
        let kernel = if let Some(low) = low {
            expect("w", w, DType::Bf16, w.rows, w.cols);
            expect("low", low, DType::U16, low.rows, low.cols);
            assert_eq!(low.elements(), n, "a low half for every weight");
            arguments.push(Pointer(self.device.address(low)));
            self.by_fours(&[w, low, m, v, g], "adamw_split_4", "adamw_split_1")
        } else {
            expect("w", w, DType::F32, w.rows, w.cols);
            self.by_fours(&[w, m, v, g], "adamw_wide_4", "adamw_wide_1")
        };
        arguments.extend([m, v, g, scale].map(|tensor| Pointer(self.device.address(tensor))));
        // The kernel takes the bits of both as unsigned.
        let (key, first) = (key(hyper) as i64, hyper.first_index as i64);
        arguments.extend([Count(n as i64), Count(key), Count(first)]);
        arguments.extend([m, g].map(|tensor| Flag(is_wide(tensor).into())));
        let c = Constants::<f32>::of(hyper);
        let constants =
            [c.beta1, c.beta2, c.one_minus_beta1, c.one_minus_beta2, c.rate, c.v_scale, c.epsilon, c.shrink];
        arguments.extend(constants.map(Float));
        self.kernels.launch(&self.device, kernel, self.flat(n, THREADS, ELEMENTS_OF_A_THREAD), &arguments)
    }
}

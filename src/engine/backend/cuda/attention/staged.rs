//! Rows of packed documents copied to where one call has them, and back: the kernels of attention.cu on staged tensors.

use super::{
    super::{
        super::Tensor,
        Cuda,
        kernels::{
            Argument::{self, Count, Flag, Pointer},
            StagedRows,
        },
    },
    ELEMENTS, grid,
};
use crate::engine::Result;

/// Log-sum-exps that a thread of attention.cu takes.
const STATISTICS: u64 = 4;

/// Which rows and heads of a tensor a staged one holds: `[documents, groups, rows, heads * head_dim]` bf16, and of log-sum-exps
/// `[documents, groups, heads, rows]` f32.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Staged {
    pub(crate) documents: u64,
    /// kv heads of a document.
    pub(crate) groups: u64,
    pub(crate) rows: u64,
    /// Heads of a group.
    pub(crate) heads: u64,
    pub(crate) head_dim: u64,
    /// First head of the tensor's.
    pub(crate) head: u64,
    /// The documents' rows in it.
    pub(crate) at: StagedRows,
}

impl Staged {
    fn width(&self) -> u64 {
        self.heads * self.head_dim
    }

    /// Vectors of a staged tensor.
    fn vectors(&self) -> u64 {
        self.statistics() * self.head_dim / ELEMENTS
    }

    /// Elements of staged log-sum-exps.
    fn statistics(&self) -> u64 {
        self.documents * self.groups * self.rows * self.heads
    }
}

impl Cuda {
    /// `staged` = its rows of a bf16 tensor, zeros where there are none.
    pub(crate) fn stage(&self, staged: &Staged, to: u64, from: Tensor) -> Result {
        self.move_staged("attention_stage", staged, to, from)
    }

    /// Its rows of an f32 tensor += `staged`.
    pub(crate) fn add_staged(&self, staged: &Staged, from: u64, to: Tensor) -> Result {
        self.move_staged("attention_add_staged", staged, from, to)
    }

    fn move_staged(&self, kernel: &'static str, staged: &Staged, address: u64, tensor: Tensor) -> Result {
        let vectors = staged.vectors();
        let mut arguments = vec![
            Pointer(address),
            Pointer(self.element(tensor, 0, staged.head * staged.head_dim)),
            Argument::StagedRows(&staged.at),
        ];
        arguments.extend([vectors, staged.rows, staged.width() / ELEMENTS, staged.groups].map(Argument::small));
        arguments.push(Count(tensor.cols as i64));
        self.kernels.launch(&self.device, kernel, grid(vectors), &arguments)
    }

    /// Staged log-sum-exps = those of the chunk, and where there are none one at which nothing is seen.
    pub(crate) fn stage_statistics(&self, staged: &Staged, to: u64, lse: Tensor) -> Result {
        let arguments = self.of_statistics(staged, to, lse);
        self.kernels.launch(
            &self.device,
            "attention_stage_statistics",
            grid(staged.statistics().div_ceil(STATISTICS)),
            &arguments,
        )
    }

    fn of_statistics<'a>(&self, staged: &'a Staged, address: u64, lse: Tensor) -> Vec<Argument<'a>> {
        let mut arguments =
            vec![Pointer(address), Pointer(self.element(lse, staged.head, 0)), Argument::StagedRows(&staged.at)];
        arguments.extend([staged.statistics(), staged.rows, staged.heads, staged.groups].map(Argument::small));
        arguments.push(Count(lse.cols as i64));
        arguments
    }

    /// Puts a call's output at `part` together with f32 `sums`, by the log-sum-exps of both, which stay as they are.
    pub(crate) fn merge_output(
        &self,
        staged: &Staged,
        (sums, part): (Tensor, u64),
        (lse, part_lse): (Tensor, u64),
        first: bool,
    ) -> Result {
        let vectors = staged.vectors();
        let head = staged.head;
        let pointers = [part, self.element(sums, 0, head * staged.head_dim), part_lse, self.element(lse, head, 0)];
        let mut arguments: Vec<_> = pointers.map(Pointer).into();
        arguments.push(Argument::StagedRows(&staged.at));
        let (width, d) = (staged.width() / ELEMENTS, staged.head_dim / ELEMENTS);
        arguments.extend([vectors, staged.rows, width, d, staged.groups].map(Argument::small));
        arguments.extend([sums.cols, lse.cols].map(|stride| Count(stride as i64)));
        arguments.push(Flag(first.into()));
        self.kernels.launch(&self.device, "attention_merge", grid(vectors), &arguments)
    }

    /// Puts a call's log-sum-exps together with those of the chunk, after its output.
    pub(crate) fn merge_statistics(&self, staged: &Staged, (lse, part_lse): (Tensor, u64), first: bool) -> Result {
        let mut arguments = self.of_statistics(staged, part_lse, lse);
        arguments.push(Flag(first.into()));
        self.kernels.launch(
            &self.device,
            "attention_merge_statistics",
            grid(staged.statistics().div_ceil(STATISTICS)),
            &arguments,
        )
    }
}

//! The sizes of an attention call, and the layout of each of its tensors.
//!
//! Single: one piece of queries against one of keys; a kv head is a batch entry to the library, so that all of them, one, or a
//! part of one's group make one call. Packed: a batch entry is a document, of a length that the call brings along in device
//! memory, so that one plan serves all lengths up to the shape's.

use super::graph::{BF16, F32, Layout};

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mask {
    /// All.
    None,
    /// Those not behind it, counted from the first of both.
    Causal,
    /// Those not behind it, where the last query is at the last key.
    CausalFromEnd,
}

/// Sizes of a call, strides in elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub(crate) mask: Mask,
    /// Documents of a packed call.
    pub(crate) documents: Option<i64>,
    pub(crate) kv_heads: i64,
    /// Query heads of each kv head of the call.
    pub(crate) heads: i64,
    pub(crate) head_dim: i64,
    /// In a packed call these two are the most of a document.
    pub(crate) queries: i64,
    pub(crate) keys: i64,
    /// Between rows of q, o and do.
    pub(crate) q_stride: i64,
    /// Between rows of k and v.
    pub(crate) kv_stride: i64,
    /// Between heads of the log-sum-exps and deltas; a packed call has them as `[rows, heads]`, packed.
    pub(crate) stats_stride: i64,
}

impl Shape {
    pub(super) fn scale(&self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }

    /// Query heads of the whole call.
    pub(crate) fn all_heads(&self) -> i64 {
        self.kv_heads * self.heads
    }

    /// Batch, and query heads of an entry.
    fn entries(&self) -> (i64, i64) {
        self.documents.map_or((self.kv_heads, self.heads), |documents| (documents, self.all_heads()))
    }

    /// Rows `stride` apart that hold heads beside one another.
    fn rows(&self, rows: i64, of_kv: i64, stride: i64) -> Layout {
        let (kv_heads, d) = (self.kv_heads, self.head_dim);
        let (dims, batch) = match self.documents {
            None => ([kv_heads, of_kv, rows, d], of_kv * d),
            Some(documents) => ([documents, kv_heads * of_kv, rows, d], rows * stride),
        };
        Layout { dtype: BF16, dims, strides: [batch, d, stride, 1], starts: None }
    }

    pub(super) fn query_rows(&self) -> Layout {
        self.rows(self.queries, self.heads, self.q_stride)
    }

    pub(super) fn query_gradients(&self) -> Layout {
        self.rows(self.queries, self.heads, self.all_heads() * self.head_dim)
    }

    pub(super) fn key_rows(&self) -> Layout {
        self.rows(self.keys, 1, self.kv_stride)
    }

    pub(super) fn key_gradients(&self) -> Layout {
        self.rows(self.keys, 1, self.kv_heads * self.head_dim)
    }

    pub(super) fn scores(&self) -> Layout {
        let (batch, heads) = self.entries();
        Layout::packed(F32, [batch, heads, self.queries, self.keys])
    }

    pub(super) fn statistics(&self) -> Layout {
        let (batch, heads) = self.entries();
        let strides = match self.documents {
            None => [heads * self.stats_stride, self.stats_stride, 1, 1],
            Some(_) => [heads * self.queries, 1, heads, 1],
        };
        Layout { dtype: F32, dims: [batch, heads, self.queries, 1], strides, starts: None }
    }

    /// A row statistic that never reaches memory.
    pub(super) fn row(&self) -> Layout {
        let (batch, heads) = self.entries();
        Layout::packed(F32, [batch, heads, self.queries, 1])
    }

    /// f32 sums of dq: a packed call's lie as dq does.
    pub(super) fn dq_sums(&self) -> Layout {
        let (batch, heads) = self.entries();
        match self.documents {
            None => Layout::packed(F32, [batch, heads, self.queries, self.head_dim]),
            Some(_) => self.query_gradients().of(F32),
        }
    }

    /// Gradients of k or v before the sum over the heads of a group.
    pub(super) fn by_head(&self) -> Layout {
        let (batch, heads) = self.entries();
        match self.documents {
            None => Layout::packed(BF16, [batch, heads, self.keys, self.head_dim]),
            Some(_) => self.rows(self.keys, self.heads, self.all_heads() * self.head_dim),
        }
    }
}

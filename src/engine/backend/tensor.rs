//! A tensor: where its elements lie in an arena. A handle of four words, not an owner; contiguous, row-major, no strides.

/// Element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F32,
    F64,
    Bf16,
    /// Token ids, labels, positions.
    I32,
    /// Low halves of f32 master weights whose high halves are bf16 weights.
    U16,
}

impl DType {
    /// Bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::Bf16 | Self::U16 => 2,
        }
    }
}

/// Which of a rank's two arenas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Space {
    /// Where operations compute.
    Device,
    /// Host memory that copies reach without a staging buffer (pinned, on CUDA).
    Host,
}

/// `rows` x `cols` elements in an arena, starting `offset` bytes from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensor {
    pub space: Space,
    /// Byte offset in the arena. Whole tensors start at multiples of [`ALIGNMENT`]; row ranges at multiples of the row size.
    pub offset: u64,
    pub dtype: DType,
    pub rows: u64,
    pub cols: u64,
}

/// Every region of an arena starts at a multiple of this many bytes.
pub const ALIGNMENT: u64 = 256;

impl Tensor {
    /// A matrix at a place in the device arena.
    pub fn device(offset: u64, dtype: DType, rows: u64, cols: u64) -> Self {
        Self { space: Space::Device, offset, dtype, rows, cols }
    }

    /// Number of elements; may pass 2^31.
    pub fn elements(&self) -> u64 {
        self.rows * self.cols
    }

    /// Bytes from the first element to the last.
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.bytes()
    }

    /// Rows `start..end` of it.
    ///
    /// # Panics
    /// When the range leaves the tensor: a bug in the caller's walk.
    #[must_use]
    pub fn rows(&self, start: u64, end: u64) -> Self {
        assert!(start <= end && end <= self.rows, "rows {start}..{end} of a tensor with {} rows", self.rows);
        Self { offset: self.offset + start * self.cols * self.dtype.bytes(), rows: end - start, ..*self }
    }

    /// Elements `first..first + n` as one row, wherever rows begin.
    ///
    /// # Panics
    /// When they leave the tensor.
    #[must_use]
    pub fn part(&self, first: u64, n: u64) -> Self {
        assert!(first + n <= self.elements(), "elements {first}..{} of {self:?}", first + n);
        Self { offset: self.offset + first * self.dtype.bytes(), rows: 1, cols: n, ..*self }
    }

    /// The same elements under another shape that needs no more of them (a work buffer used for a smaller tile).
    ///
    /// # Panics
    /// When the new shape needs more elements than there are.
    #[must_use]
    pub fn shaped(&self, rows: u64, cols: u64) -> Self {
        assert!(rows * cols <= self.elements(), "{rows} x {cols} does not fit {} x {}", self.rows, self.cols);
        Self { rows, cols, ..*self }
    }
}

/// One run of rows in two places: a stretch of them in host memory, those before and after it on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    pub host: Tensor,
    pub device: Tensor,
    /// First row of the stretch.
    pub host_start: u64,
}

impl Split {
    /// All of it on the device.
    pub fn resident(device: Tensor) -> Self {
        let host = Tensor { space: Space::Host, offset: 0, rows: 0, ..device };
        Self { host, device, host_start: 0 }
    }

    /// Rows in all.
    pub fn n_rows(&self) -> u64 {
        self.host.rows + self.device.rows
    }

    /// Rows `start..end` as the one to three tensors that hold them, in order.
    ///
    /// # Panics
    /// When the range leaves the rows: a bug in the caller's walk.
    pub fn rows(&self, start: u64, end: u64) -> impl Iterator<Item = Tensor> + use<> {
        assert!(start <= end && end <= self.n_rows(), "rows {start}..{end} of {}", self.n_rows());
        let Self { host, device, host_start } = *self;
        let host_end = host_start + host.rows;
        let parts = [
            (device, 0, host_start, 0),
            (host, host_start, host_end, host_start),
            (device, host_end, u64::MAX, host.rows),
        ];
        parts.into_iter().filter_map(move |(tensor, from, to, before)| {
            let (first, last) = (start.max(from), end.min(to));
            (first < last).then(|| tensor.rows(first - before, last - before))
        })
    }
}

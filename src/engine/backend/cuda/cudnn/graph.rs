//! Graphs: tensors with dimensions and strides, and the operations between them.

use cudarc::cudnn::sys::{
    cudnnBackendAttributeName_t as Attribute, cudnnBackendDescriptorType_t as Kind, cudnnDataType_t,
    cudnnPointwiseMode_t as Pointwise, cudnnReduceTensorOp_t as Reduction,
};

use super::descriptor::{Descriptor, Reference};
use crate::engine::Result;

pub(super) const BF16: cudnnDataType_t = cudnnDataType_t::CUDNN_DATA_BFLOAT16;
pub(super) const F32: cudnnDataType_t = cudnnDataType_t::CUDNN_DATA_FLOAT;
pub(super) const I32: cudnnDataType_t = cudnnDataType_t::CUDNN_DATA_INT32;
pub(super) const BOOL: cudnnDataType_t = cudnnDataType_t::CUDNN_DATA_BOOLEAN;

/// Every address in a call is a multiple of this.
const ADDRESS_ALIGNMENT: i64 = 16;
/// Ids below are the caller's, for tensors in memory; above come intermediates and scalars, numbered as they are made.
const FIRST_OWN_ID: i64 = 1000;

/// Element type, dimensions and strides in elements: batch, heads, rows, columns.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) dtype: cudnnDataType_t,
    pub(super) dims: [i64; 4],
    pub(super) strides: [i64; 4],
}

impl Layout {
    /// Rows after one another without gaps.
    pub(super) fn packed(dtype: cudnnDataType_t, dims: [i64; 4]) -> Self {
        let [_, heads, rows, cols] = dims;
        Self { dtype, dims, strides: [heads * rows * cols, rows * cols, cols, 1] }
    }

    /// The same elements with rows and columns exchanged.
    pub(super) fn transposed(self) -> Self {
        let ([b, h, r, c], [sb, sh, sr, sc]) = (self.dims, self.strides);
        Self { dims: [b, h, c, r], strides: [sb, sh, sc, sr], ..self }
    }

    /// The same shape with other elements.
    pub(super) fn of(self, dtype: cudnnDataType_t) -> Self {
        Self { dtype, ..self }
    }
}

/// A graph under construction, and afterwards the owner of its descriptors.
#[derive(Debug, Default)]
pub(super) struct Graph {
    descriptors: Vec<Descriptor>,
    operations: Vec<Reference>,
    /// Values that a call passes by host pointer: id and bits of an f32 or int32.
    scalars: Vec<(i64, u32)>,
    own_ids: i64,
}

impl Graph {
    pub(super) fn operations(&self) -> &[Reference] {
        &self.operations
    }

    pub(super) fn scalars(&self) -> &[(i64, u32)] {
        &self.scalars
    }

    fn keep(&mut self, descriptor: Descriptor) -> Result<Reference> {
        let descriptor = descriptor.finalize()?;
        let reference = descriptor.reference();
        self.descriptors.push(descriptor);
        Ok(reference)
    }

    fn operation(&mut self, descriptor: Descriptor) -> Result {
        let reference = self.keep(descriptor)?;
        self.operations.push(reference);
        Ok(())
    }

    fn own_id(&mut self) -> i64 {
        self.own_ids += 1;
        FIRST_OWN_ID + self.own_ids
    }

    fn described(id: i64, layout: Layout) -> Result<Descriptor> {
        Descriptor::new(Kind::CUDNN_BACKEND_TENSOR_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_TENSOR_DATA_TYPE, &[layout.dtype])?
            .set(Attribute::CUDNN_ATTR_TENSOR_DIMENSIONS, &layout.dims)?
            .set(Attribute::CUDNN_ATTR_TENSOR_STRIDES, &layout.strides)?
            .set(Attribute::CUDNN_ATTR_TENSOR_UNIQUE_ID, &[id])?
            .set(Attribute::CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, &[ADDRESS_ALIGNMENT])
    }

    /// A tensor in memory, bound by `id` at each call.
    pub(super) fn tensor(&mut self, id: i64, layout: Layout) -> Result<Reference> {
        let descriptor = Self::described(id, layout)?;
        self.keep(descriptor)
    }

    /// An intermediate that never reaches memory.
    pub(super) fn between(&mut self, layout: Layout) -> Result<Reference> {
        let id = self.own_id();
        let descriptor = Self::described(id, layout)?.set(Attribute::CUDNN_ATTR_TENSOR_IS_VIRTUAL, &[true])?;
        self.keep(descriptor)
    }

    fn scalar(&mut self, dtype: cudnnDataType_t, bits: u32) -> Result<Reference> {
        let id = self.own_id();
        self.scalars.push((id, bits));
        let layout = Layout { dtype, dims: [1; 4], strides: [1; 4] };
        let descriptor = Self::described(id, layout)?.set(Attribute::CUDNN_ATTR_TENSOR_IS_BY_VALUE, &[true])?;
        self.keep(descriptor)
    }

    /// An f32 that every element meets.
    pub(super) fn float(&mut self, value: f32) -> Result<Reference> {
        self.scalar(F32, value.to_bits())
    }

    /// An int32 that every element meets.
    pub(super) fn integer(&mut self, value: i32) -> Result<Reference> {
        self.scalar(I32, value.cast_unsigned())
    }

    /// `c = a b`, accumulated in f32.
    pub(super) fn matmul(&mut self, c: Reference, a: Reference, b: Reference) -> Result {
        let matmul = Descriptor::new(Kind::CUDNN_BACKEND_MATMUL_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_MATMUL_COMP_TYPE, &[F32])?;
        let matmul = self.keep(matmul)?;
        let operation = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_OPERATION_MATMUL_ADESC, &[a])?
            .set(Attribute::CUDNN_ATTR_OPERATION_MATMUL_BDESC, &[b])?
            .set(Attribute::CUDNN_ATTR_OPERATION_MATMUL_CDESC, &[c])?
            .set(Attribute::CUDNN_ATTR_OPERATION_MATMUL_DESC, &[matmul])?;
        self.operation(operation)
    }

    /// `y = mode(x, b)`, in the given precision.
    pub(super) fn pointwise(
        &mut self,
        mode: Pointwise,
        y: Reference,
        x: Reference,
        b: Option<Reference>,
        precision: cudnnDataType_t,
    ) -> Result {
        let pointwise = Self::pointwise_of(mode, precision)?;
        let pointwise = self.keep(pointwise)?;
        let mut operation = Self::pointwise_operation(pointwise, y, x)?;
        if let Some(b) = b {
            operation = operation.set(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &[b])?;
        }
        self.operation(operation)
    }

    /// `y = condition ? x : otherwise`.
    pub(super) fn select(&mut self, y: Reference, condition: Reference, x: Reference, otherwise: Reference) -> Result {
        let pointwise = Self::pointwise_of(Pointwise::CUDNN_POINTWISE_BINARY_SELECT, F32)?;
        let pointwise = self.keep(pointwise)?;
        let operation = Self::pointwise_operation(pointwise, y, x)?
            .set(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_BDESC, &[otherwise])?
            .set(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_TDESC, &[condition])?;
        self.operation(operation)
    }

    /// `y` = the index of each element along an axis of x.
    pub(super) fn index(&mut self, y: Reference, x: Reference, axis: i64) -> Result {
        let pointwise = Self::pointwise_of(Pointwise::CUDNN_POINTWISE_GEN_INDEX, F32)?
            .set(Attribute::CUDNN_ATTR_POINTWISE_AXIS, &[axis])?;
        let pointwise = self.keep(pointwise)?;
        let operation = Self::pointwise_operation(pointwise, y, x)?;
        self.operation(operation)
    }

    fn pointwise_of(mode: Pointwise, precision: cudnnDataType_t) -> Result<Descriptor> {
        Descriptor::new(Kind::CUDNN_BACKEND_POINTWISE_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_POINTWISE_MODE, &[mode])?
            .set(Attribute::CUDNN_ATTR_POINTWISE_MATH_PREC, &[precision])
    }

    fn pointwise_operation(pointwise: Reference, y: Reference, x: Reference) -> Result<Descriptor> {
        Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, &[pointwise])?
            .set(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_XDESC, &[x])?
            .set(Attribute::CUDNN_ATTR_OPERATION_POINTWISE_YDESC, &[y])
    }

    /// `y` = x reduced over the dimensions that are 1 in y, in f32.
    pub(super) fn reduce(&mut self, mode: Reduction, y: Reference, x: Reference) -> Result {
        let reduction = Descriptor::new(Kind::CUDNN_BACKEND_REDUCTION_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_REDUCTION_OPERATOR, &[mode])?
            .set(Attribute::CUDNN_ATTR_REDUCTION_COMP_TYPE, &[F32])?;
        let reduction = self.keep(reduction)?;
        let operation = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_OPERATION_REDUCTION_XDESC, &[x])?
            .set(Attribute::CUDNN_ATTR_OPERATION_REDUCTION_YDESC, &[y])?
            .set(Attribute::CUDNN_ATTR_OPERATION_REDUCTION_DESC, &[reduction])?;
        self.operation(operation)
    }

    /// `y` = the elements of x under y's dimensions and strides.
    pub(super) fn reshape(&mut self, y: Reference, x: Reference) -> Result {
        let operation = Descriptor::new(Kind::CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR)?
            .set(Attribute::CUDNN_ATTR_OPERATION_RESHAPE_XDESC, &[x])?
            .set(Attribute::CUDNN_ATTR_OPERATION_RESHAPE_YDESC, &[y])?;
        self.operation(operation)
    }
}

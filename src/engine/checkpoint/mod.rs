//! Weights and resume state on disk: Hugging Face folders in and out, written aside and renamed when whole.

pub mod huggingface;
pub mod safetensors;
pub mod staging;

//! The words everyone shares: ids, jobs, what was asked, what a trainer is told and says back.
//!
//! Pure types and checks. Nothing here opens a file, a socket or a database, and nothing of ours is imported.

pub mod access;
pub mod attention_workspace;
pub mod event;
pub mod fields;
pub mod heads;
pub mod hex;
pub mod hub_name;
pub mod hyperparameters;
pub mod ids;
pub mod invalid;
pub mod job;
pub mod job_request;
pub mod machine;
pub mod model;
pub mod model_config;
pub mod progress;
pub mod run;
pub mod training;

pub use access::Scope;
pub use event::{Event, Level};
pub use hex::hex;
pub use hub_name::HubName;
pub use ids::{
    CheckpointId, EventId, ExecutorId, FileId, JobId, KeyId, PartId, PermissionId, PlanId, ProjectId, UploadId,
    WebhookId,
};
pub use invalid::Invalid;
pub use job::JobStatus;
pub use job_request::JobRequest;
pub use machine::Machine;
pub use model::{BaseModel, ModelConfig};
pub use run::RunSpec;
pub use training::TrainingSpec;

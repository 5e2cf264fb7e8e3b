//! Reading an upload: multipart fields in any order, of any length, straight into the store.
//!
//! Stock clients differ (Python sends `purpose` first, Node sends `file` first and no length), so bytes go to the store as
//! they come and the form is judged when it ends; what is refused then is deleted again. Memory is bounded whatever comes.

use std::time::Duration;

use axum::extract::{
    Multipart,
    multipart::{Field, MultipartError},
};
use tokio::time::timeout;

use super::{ApiError, Settings, error::excerpt};
use crate::{
    domain::{Invalid, ProjectId},
    store::{
        Store,
        blobs::SpooledBlob,
        files::{File, NewFile},
    },
};

/// Longest silence in the middle of a body.
const STALL: Duration = Duration::from_mins(1);
/// Longest upload. Shorter than the age at which the sweep takes an unfinished blob for abandoned.
const DEADLINE: Duration = Duration::from_hours(12);
/// Longest upload of one part. Shorter than the life that a part gives its upload.
const PART_DEADLINE: Duration = Duration::from_mins(45);
/// Largest part; what stock clients send, and the form around it is not counted.
pub const MAX_PART_BYTES: u64 = 64 << 20;
/// Longest value of a field that is not the file.
const MAX_FIELD: usize = 1024;
/// Most fields of a form.
const MAX_FIELDS: usize = 16;
/// Longest name of a file, in bytes.
const MAX_FILENAME: usize = 255;
/// After a refusal so much of the rest is still read: a client that is writing sees the answer only when it has finished.
const DRAIN: u64 = 32 << 20;

/// Purposes that OpenAI's shape knows; jobs take files of the first.
pub const PURPOSES: [&str; 6] = ["fine-tune", "assistants", "batch", "evals", "user_data", "vision"];
/// What a training file's name may end in: the ending decides how it is read.
const TRAINING_FORMATS: [&str; 3] = [".jsonl", ".txt", ".md"];
/// Life that a file may be given, seconds: an hour to 30 days, as OpenAI has it.
pub const LIFE_SECONDS: std::ops::RangeInclusive<u64> = 3600..=2_592_000;

/// Fields seen so far.
#[derive(Default)]
struct Form {
    file: Option<(String, SpooledBlob)>,
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
}

/// Reads the form of one part, a field `data`, into a blob; or leaves nothing behind.
pub async fn receive_part(store: &Store, mut form: Multipart) -> Result<SpooledBlob, ApiError> {
    let received = match timeout(PART_DEADLINE, read_part(store, &mut form)).await {
        Ok(received) => received,
        Err(_) => Err(ApiError::stalled()),
    };
    if received.is_err() {
        drain(&mut form).await;
    }
    received
}

async fn read_part(store: &Store, form: &mut Multipart) -> Result<SpooledBlob, ApiError> {
    let Some(field) = next_field(form).await? else { return Err(missing("data", "the bytes of the part")) };
    if field.name() != Some("data") {
        let name = excerpt(field.name().unwrap_or_default());
        let message = format!("the form of a part has one field, data, not {name}");
        return Err(Invalid::with_code("unknown_parameter", name, message).into());
    }
    let blob = spool(store, "data", MAX_PART_BYTES, "MAX_PART_BYTES", field).await?;
    let refused: ApiError = match next_field(form).await {
        Ok(None) if blob.bytes > 0 => return Ok(blob),
        Ok(None) => Invalid::new("data", "the part is empty; send its bytes as the form field data").into(),
        Ok(Some(_)) => {
            ApiError::bad_request("too_many_fields", "the form of a part has one field, data").with_param("data")
        }
        Err(error) => error,
    };
    store.discard(blob).await?;
    Err(refused)
}

async fn next_field(form: &mut Multipart) -> Result<Option<Field<'_>>, ApiError> {
    let field = timeout(STALL, form.next_field()).await.map_err(|_| ApiError::stalled())?;
    field.map_err(|error| unread(&error))
}

/// Reads the form and makes the file, or leaves nothing behind.
pub async fn receive(
    store: &Store,
    settings: &Settings,
    project: &ProjectId,
    mut form: Multipart,
) -> Result<File, ApiError> {
    let received = match timeout(DEADLINE, read_form(store, settings, project, &mut form)).await {
        Ok(received) => received,
        Err(_) => Err(ApiError::stalled()),
    };
    match received {
        Ok((blob, new)) => Ok(store.create_file(blob, &new).await?),
        Err(error) => {
            drain(&mut form).await;
            Err(error)
        }
    }
}

/// Refuses a purpose that is none.
pub fn check_purpose(purpose: &str) -> Result<(), Invalid> {
    if PURPOSES.contains(&purpose) {
        return Ok(());
    }
    let message = format!("purpose must be one of {}, not {}", PURPOSES.join(", "), excerpt(purpose));
    Err(Invalid::new("purpose", message))
}

/// Refuses a training file by its name, while its content need not be read.
pub fn check_format(filename: &str, param: &str) -> Result<(), Invalid> {
    let name = filename.to_ascii_lowercase();
    if TRAINING_FORMATS.iter().any(|ending| name.ends_with(ending)) {
        return Ok(());
    }
    let formats = TRAINING_FORMATS.join(", ");
    let message = format!("training data is read from files named {formats}; {} is none of them", excerpt(filename));
    Err(Invalid::with_code("unsupported_format", param, message))
}

async fn read_form(
    store: &Store,
    settings: &Settings,
    project: &ProjectId,
    form: &mut Multipart,
) -> Result<(SpooledBlob, NewFile), ApiError> {
    let mut seen = Form::default();
    let read = read_fields(store, settings, form, &mut seen).await;
    let complete = read.and_then(|()| new_file(project, &seen));
    match (complete, seen.file) {
        (Ok(new), Some((_, blob))) => Ok((blob, new)),
        (Ok(_), None) => Err(missing("file", "the content, as a form field with a file name")),
        (Err(error), spooled) => {
            if let Some((_, blob)) = spooled {
                store.discard(blob).await?;
            }
            Err(error)
        }
    }
}

async fn read_fields(
    store: &Store,
    settings: &Settings,
    form: &mut Multipart,
    seen: &mut Form,
) -> Result<(), ApiError> {
    for _ in 0..MAX_FIELDS {
        let Some(field) = next_field(form).await? else { return Ok(()) };
        let name = field.name().unwrap_or_default().to_owned();
        match name.as_str() {
            "file" if seen.file.is_none() => {
                let filename = filename(&field)?;
                if seen.purpose.as_deref() == Some(PURPOSES[0]) {
                    check_format(&filename, "file")?;
                }
                seen.file =
                    Some((filename, spool(store, "file", settings.max_upload_bytes, "max_upload_bytes", field).await?));
            }
            "purpose" if seen.purpose.is_none() => {
                let purpose = text(field, "purpose").await?;
                check_purpose(&purpose)?;
                seen.purpose = Some(purpose);
            }
            "expires_after[anchor]" => seen.anchor = Some(text(field, "expires_after[anchor]").await?),
            "expires_after[seconds]" => seen.seconds = Some(text(field, "expires_after[seconds]").await?),
            "file" | "purpose" => return Err(Invalid::new(&name, format!("{name} came twice in the form")).into()),
            other => {
                let message = format!("unknown parameter: {}", excerpt(other));
                return Err(Invalid::with_code("unknown_parameter", excerpt(other), message).into());
            }
        }
    }
    Err(ApiError::bad_request("too_many_fields", format!("the form has more than {MAX_FIELDS} fields")))
}

/// Judges the form as a whole.
fn new_file(project: &ProjectId, seen: &Form) -> Result<NewFile, ApiError> {
    let purpose = seen.purpose.clone().ok_or_else(|| missing("purpose", "what the file is for, such as fine-tune"))?;
    let filename = seen.file.as_ref().map(|(name, _)| name.clone()).unwrap_or_default();
    if let Some((_, blob)) = &seen.file {
        if blob.bytes == 0 {
            return Err(Invalid::with_code("empty_file", "file", "the file is empty; upload one with content").into());
        }
        if purpose == PURPOSES[0] {
            check_format(&filename, "file")?;
        }
    }
    Ok(NewFile { project: project.clone(), filename, purpose, expires_after: life(seen)? })
}

fn life(seen: &Form) -> Result<Option<Duration>, ApiError> {
    if let Some(anchor) = seen.anchor.as_deref().filter(|anchor| *anchor != "created_at") {
        let message = format!("expires_after[anchor] must be created_at, not {}", excerpt(anchor));
        return Err(Invalid::new("expires_after[anchor]", message).into());
    }
    let Some(text) = &seen.seconds else { return Ok(None) };
    match text.parse() {
        Ok(seconds) if LIFE_SECONDS.contains(&seconds) => Ok(Some(Duration::from_secs(seconds))),
        _ => {
            let (low, high) = (LIFE_SECONDS.start(), LIFE_SECONDS.end());
            let message = format!(
                "expires_after[seconds] must be a whole number between {low} and {high}, not {}",
                excerpt(text)
            );
            Err(Invalid::new("expires_after[seconds]", message).into())
        }
    }
}

/// Streams a field's bytes into the store, at most `most`, the value of the setting of that name.
async fn spool(
    store: &Store,
    name: &str,
    most: u64,
    setting: &str,
    mut field: Field<'_>,
) -> Result<SpooledBlob, ApiError> {
    let mut blob = store.begin_blob().await?;
    while let Some(bytes) =
        timeout(STALL, field.chunk()).await.map_err(|_| ApiError::stalled())?.map_err(|error| unread(&error))?
    {
        if blob.bytes() + bytes.len() as u64 > most {
            return Err(ApiError::too_large(&format!("the {name}"), most, setting).with_param(name));
        }
        blob.write(bytes).await?;
    }
    Ok(blob.finish().await?)
}

/// The name a file was sent under: a label, without the folders that some clients send along.
fn filename(field: &Field<'_>) -> Result<String, ApiError> {
    label(field.file_name().unwrap_or("upload"), "file")
}

/// A file's name, cut to its last part and checked.
pub fn label(sent: &str, param: &str) -> Result<String, ApiError> {
    let name = sent.rsplit(['/', '\\']).next().unwrap_or(sent).trim();
    if name.is_empty() || name.len() > MAX_FILENAME || name.chars().any(char::is_control) {
        let message = format!("the file's name must be 1 to {MAX_FILENAME} bytes without control characters");
        return Err(Invalid::new(param, message).into());
    }
    Ok(name.to_owned())
}

async fn text(mut field: Field<'_>, name: &str) -> Result<String, ApiError> {
    let mut value = Vec::new();
    while let Some(bytes) =
        timeout(STALL, field.chunk()).await.map_err(|_| ApiError::stalled())?.map_err(|error| unread(&error))?
    {
        if value.len() + bytes.len() > MAX_FIELD {
            return Err(Invalid::new(name, format!("{name} must be at most {MAX_FIELD} bytes long")).into());
        }
        value.extend_from_slice(&bytes);
    }
    String::from_utf8(value).map_err(|_| Invalid::new(name, format!("{name} must be UTF-8 text")).into())
}

/// Reads on for a while without keeping anything; the answer is decided.
async fn drain(form: &mut Multipart) {
    let mut left = DRAIN;
    let rest = async {
        while let Ok(Some(mut field)) = form.next_field().await {
            while let Ok(Some(bytes)) = field.chunk().await {
                left = left.saturating_sub(bytes.len() as u64);
                if left == 0 {
                    return;
                }
            }
        }
    };
    // Whether the rest came or not changes nothing.
    let _ = timeout(STALL, rest).await;
}

fn missing(name: &str, what: &str) -> ApiError {
    Invalid::with_code("missing_required_parameter", name, format!("you must provide {name}: {what}")).into()
}

fn unread(error: &MultipartError) -> ApiError {
    let message = format!("the form cannot be read: {}", error.body_text());
    ApiError::bad_request("invalid_multipart", message).with_param("body")
}

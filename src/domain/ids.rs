//! Identifiers: a prefix that says what it is, and 24 random base-62 characters (142 bits).

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const LENGTH: usize = 24;

/// `LENGTH` characters of base 62 from the operating system's randomness.
pub fn random_suffix() -> String {
    random_text(LENGTH)
}

/// So many characters of base 62 from the operating system's randomness.
///
/// # Panics
/// When the operating system has no randomness to give, where nothing safe can be done.
pub fn random_text(length: usize) -> String {
    let mut out = String::with_capacity(length);
    let mut bytes = [0u8; 64];
    while out.len() < length {
        getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
        // 248 = 4 * 62: bytes above it would make some characters more likely than others.
        let fair = bytes.iter().filter(|b| **b < 248).map(|b| char::from(ALPHABET[usize::from(*b) % 62]));
        out.extend(fair.take(length - out.len()));
    }
    out
}

/// A number as so many digits of base 62, the last ones of it.
pub fn base62(mut number: u64, digits: usize) -> String {
    let mut out = vec!['0'; digits];
    for digit in out.iter_mut().rev() {
        *digit = char::from(ALPHABET[(number % 62) as usize]);
        number /= 62;
    }
    out.into_iter().collect()
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// What every id of this kind begins with.
            pub const PREFIX: &'static str = $prefix;

            /// A fresh random id.
            pub fn random() -> Self {
                Self(format!("{}{}", $prefix, random_suffix()))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = ();
            /// Accepts the prefix and 1 to 64 base-62 characters: ids become path segments and must hold nothing else.
            fn from_str(s: &str) -> Result<Self, ()> {
                let rest = s.strip_prefix($prefix).ok_or(())?;
                let plain = !rest.is_empty() && rest.len() <= 64 && rest.bytes().all(|b| b.is_ascii_alphanumeric());
                plain.then(|| Self(s.to_owned())).ok_or(())
            }
        }
    };
}

id!(/** An uploaded file. */ FileId, "file-");
id!(/** An upload in parts. */ UploadId, "upload_");
id!(/** One part of an upload. */ PartId, "part_");
id!(/** A fine-tuning job. */ JobId, "ftjob-");
id!(/** A plan of a job that nobody has made. */ PlanId, "ftplan-");
id!(/** One event of a job. */ EventId, "ftevent-");
id!(/** One checkpoint of a job. */ CheckpointId, "ftckpt_");
id!(/** A project's permission to use a checkpoint. */ PermissionId, "cp_");
id!(/** A receiver of webhooks. */ WebhookId, "whe_");
id!(/** A project, to which files, jobs and keys belong. */ ProjectId, "proj_");
id!(/** A key, as lists name it; the key itself is a secret. */ KeyId, "key_");
id!(/** One running executor process; new at every start. */ ExecutorId, "exec-");

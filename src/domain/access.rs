//! Keys and what they may do.
//!
//! A key is `lhk_`, 43 random characters of base 62 (256 bits), and 6 that follow from them: a scanner for leaked secrets
//! knows a key by its looks alone, and a mistyped one is refused without a look into the database.

use sha2::{Digest, Sha256};

use super::{
    ProjectId, hex,
    ids::{base62, random_text},
};

/// What every key begins with.
pub const KEY_PREFIX: &str = "lhk_";
/// Random characters of a key.
const SECRET: usize = 43;
/// Characters that follow from the others.
const CHECK: usize = 6;
/// Characters of a key that may be shown.
const HINT: usize = 4;
/// The project of whatever was made without a key.
const DEFAULT_PROJECT: &str = "proj_default";

/// What a key may do. Each may do what those before it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Look and download.
    Read,
    /// Upload, train, delete.
    Write,
    /// Open models to other projects.
    Admin,
}

impl Scope {
    /// The word used on the command line and in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
        }
    }

    /// The scope of that word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Read, Self::Write, Self::Admin].into_iter().find(|scope| scope.as_str() == word)
    }
}

impl ProjectId {
    /// The project of whatever was made without a key.
    ///
    /// # Panics
    /// Never: the constant is an id.
    pub fn default_project() -> Self {
        DEFAULT_PROJECT.parse().expect("the constant is an id")
    }
}

/// A key as text. Shown once, when it is made.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// A fresh random key.
    pub fn random() -> Self {
        let body = random_text(SECRET);
        Self(format!("{KEY_PREFIX}{body}{}", check(&body)))
    }

    /// Reads a key; none where the text cannot be one.
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix(KEY_PREFIX)?;
        let looks = rest.len() == SECRET + CHECK && rest.bytes().all(|b| b.is_ascii_alphanumeric());
        let (body, given) = looks.then(|| rest.split_at(SECRET))?;
        (check(body) == given).then(|| Self(text.to_owned()))
    }

    /// The key itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// What is kept of it: the SHA-256 of the whole, hex. It is random enough that this cannot be turned round.
    pub fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.0))
    }

    /// Its last characters, by which its owner knows it again.
    pub fn hint(&self) -> &str {
        &self.0[self.0.len() - HINT..]
    }
}

impl std::fmt::Debug for Secret {
    /// Keys must not get into logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{KEY_PREFIX}...{}", self.hint())
    }
}

/// The first 32 bits of the SHA-256 of the random characters, in base 62.
fn check(body: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(body).into();
    base62(u64::from(u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]])), CHECK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_its_looks() {
        let key = Secret::random();
        let text = key.reveal();
        assert_eq!((text.len(), Secret::parse(text).as_ref()), (53, Some(&key)));
        assert_ne!(key, Secret::random());
        let shown = format!("{key:?}");
        assert!(!shown.contains(&text[4..40]) && shown.ends_with(key.hint()), "{shown}");
        // One wrong character anywhere is noticed.
        for place in 0..text.len() {
            let mut bytes = text.as_bytes().to_vec();
            bytes[place] = if bytes[place] == b'a' { b'b' } else { b'a' };
            assert_eq!(Secret::parse(std::str::from_utf8(&bytes).expect("ASCII")), None, "at {place}");
        }
        for wrong in ["", "lhk_", &text[1..], &text[..52], &format!("{text}a"), "lhk_\u{e9}"] {
            assert_eq!(Secret::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_check_is_the_documented_one() {
        // Worked out elsewhere: the first 32 bits of the SHA-256 of 43 times `a` are 0x66d34fba.
        assert_eq!((check(&"a".repeat(SECRET)), base62(0x66d3_4fba, 6)), ("1skRhK".to_owned(), "1skRhK".to_owned()));
        assert_eq!(base62(61 + 62 * 10, 3), "0Az");
    }

    #[test]
    fn scopes_contain_one_another() {
        assert!(Scope::Read < Scope::Write && Scope::Write < Scope::Admin);
        assert_eq!(Scope::parse("write"), Some(Scope::Write));
        assert_eq!(Scope::parse("Write"), None);
    }
}

//! `organization/name` or `organization/name@revision`: what a job may ask for as its model beside the folders of hosts.

use std::{fmt, str::FromStr};

/// The revision where none is named.
pub const MAIN: &str = "main";
/// The names, as Postgres matches them. [`HubName`] refuses a few more.
pub const PATTERN: &str = "^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*(@[A-Za-z0-9_][A-Za-z0-9_.-]*)?$";
/// Most characters of `organization/name`, as hubs have it.
const LONGEST: usize = 96;

/// A repository of a hub at a revision. Its parts are single components of paths and of URLs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    pub organization: String,
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl HubName {
    /// `organization/name`
    pub fn repository(&self) -> String {
        format!("{}/{}", self.organization, self.name)
    }
}

impl FromStr for HubName {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, MAIN));
        let (organization, name) = repository.split_once('/').ok_or(())?;
        let sound = [organization, name, revision].into_iter().all(is_component);
        // `--` stands for the slash in the names of the cache's folders.
        if !sound || repository.len() > LONGEST || repository.contains("--") {
            return Err(());
        }
        Ok(Self { organization: organization.to_owned(), name: name.to_owned(), revision: revision.to_owned() })
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.organization, self.name)?;
        if self.revision == MAIN { Ok(()) } else { write!(f, "@{}", self.revision) }
    }
}

fn is_component(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_.-".contains(&b);
    text.bytes().all(plain) && text.bytes().next().is_some_and(|b| b != b'.' && b != b'-') && !text.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_hub_are_told_from_others() {
        let name: HubName = "meta-llama/Llama-3.1-8B@v2.0".parse().expect("a name");
        assert_eq!((name.repository().as_str(), name.revision.as_str()), ("meta-llama/Llama-3.1-8B", "v2.0"));
        assert_eq!(name.to_string(), "meta-llama/Llama-3.1-8B@v2.0");
        assert_eq!("a/b@main".parse::<HubName>().map(|name| name.to_string()), Ok("a/b".to_owned()));
        let long = format!("a/{}", "b".repeat(LONGEST));
        for other in [
            "", "small", "a/", "/b", "a/b/c", "../b", "a/..", "a/.b", "a/b..c", "-a/b", "a--b/c", "a/b@", "a/b@../c",
            "a b/c", &long,
        ] {
            assert!(other.parse::<HubName>().is_err(), "{other}");
        }
    }
}

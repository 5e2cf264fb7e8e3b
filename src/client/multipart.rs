//! The body of an upload: a form (RFC 7578) whose one file is read as it is sent, never held.

use std::{
    fs::File,
    io::{self, Cursor, Read},
};

use crate::domain::ids::random_suffix;

/// A form with one file, and how it is announced.
pub struct Form {
    pub content_type: String,
    /// Bytes of the whole body.
    pub length: u64,
    pub body: Box<dyn Read>,
}

/// A form with the field `purpose` and then `bytes` bytes of `file`. `passed` sees each count of file bytes go by.
pub fn form(file: File, bytes: u64, filename: &str, purpose: &str, passed: impl Fn(u64) + 'static) -> Form {
    let boundary = random_suffix();
    let purpose = format!("--{boundary}\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n");
    around(&boundary, &purpose, "file", filename, Exactly { file, left: bytes, passed })
}

/// A form with the one field `data`: the next `bytes` bytes of `file`, as a part of an upload.
pub fn part(file: File, bytes: u64, passed: impl Fn(u64) + 'static) -> Form {
    around(&random_suffix(), "", "data", "part", Exactly { file, left: bytes, passed })
}

/// The form around a file; `before` are fields in front of it.
fn around<F: Fn(u64) + 'static>(boundary: &str, before: &str, field: &str, filename: &str, file: Exactly<F>) -> Form {
    let head = format!(
        "{before}--{boundary}\r\nContent-Disposition: form-data; name=\"{field}\"; filename=\"{}\"\r\n\
         Content-Type: application/octet-stream\r\n\r\n",
        quoted(filename)
    );
    let tail = format!("\r\n--{boundary}--\r\n");
    let length = head.len() as u64 + file.left + tail.len() as u64;
    let body = Cursor::new(head).chain(file).chain(Cursor::new(tail));
    Form { content_type: format!("multipart/form-data; boundary={boundary}"), length, body: Box::new(body) }
}

/// A file name inside quotes, escaped as browsers do.
fn quoted(name: &str) -> String {
    name.replace('"', "%22").replace('\r', "%0D").replace('\n', "%0A")
}

/// A file's next so many bytes: more are left out, fewer are an error, since the length has been promised.
struct Exactly<F> {
    file: File,
    left: u64,
    passed: F,
}

impl<F: Fn(u64)> Read for Exactly<F> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let wanted = self.left.min(into.len() as u64) as usize;
        if wanted == 0 {
            return Ok(0);
        }
        let n = self.file.read(&mut into[..wanted])?;
        if n == 0 {
            return Err(io::Error::other("the file became shorter while it was sent"));
        }
        self.left -= n as u64;
        (self.passed)(n as u64);
        Ok(n)
    }
}

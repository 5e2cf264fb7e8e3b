//! Upload forms by hand: fields in the order given, sent in pieces and without a length, as the pickiest clients do.

use axum::{
    body::{Body, Bytes},
    http::{Request, header},
};
use futures_util::{StreamExt, stream};

const BOUNDARY: &str = "a-boundary-of-the-tests";
/// Bytes of one piece; a prime, so that pieces and rows never meet.
const PIECE: usize = 65_521;

/// A multipart form.
#[derive(Debug, Default)]
pub struct Form {
    bytes: Vec<u8>,
}

impl Form {
    pub fn new() -> Self {
        Self::default()
    }

    /// What a training file needs, in the order of Python's client.
    pub fn training(filename: &str, content: &[u8]) -> Self {
        Self::new().field("purpose", "fine-tune").file(filename, content)
    }

    pub fn field(mut self, name: &str, value: &str) -> Self {
        let head = format!("--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
        self.bytes.extend(head.into_bytes());
        self
    }

    pub fn file(self, filename: &str, content: &[u8]) -> Self {
        self.content("file", filename, content)
    }

    /// The form of one part of an upload, as Python's client sends it.
    pub fn part(content: &[u8]) -> Self {
        Self::new().content("data", "upload", content)
    }

    pub fn content(mut self, name: &str, filename: &str, content: &[u8]) -> Self {
        let head = format!(
            "--{BOUNDARY}\r\nContent-Disposition: form-data; name=\"{name}\"; filename=\"{filename}\"\r\n\
             Content-Type: application/octet-stream\r\n\r\n"
        );
        self.bytes.extend(head.into_bytes());
        self.bytes.extend(content);
        self.bytes.extend(b"\r\n");
        self
    }

    /// The whole body, with its end.
    pub fn bytes(mut self) -> Vec<u8> {
        self.bytes.extend(format!("--{BOUNDARY}--\r\n").into_bytes());
        self.bytes
    }

    /// The request, in pieces, without a length.
    pub fn request(self) -> Request<Body> {
        self.request_to("/v1/files")
    }

    /// The same for another path.
    pub fn request_to(self, path: &str) -> Request<Body> {
        post(path, Body::from_stream(pieces(self.bytes())))
    }

    /// The request of a client that goes away before the end of the form.
    pub fn broken_off(self) -> Request<Body> {
        let gone = stream::once(async { Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)) });
        upload(Body::from_stream(pieces(self.bytes).chain(gone)))
    }
}

/// An upload with this body.
pub fn upload(body: Body) -> Request<Body> {
    post("/v1/files", body)
}

/// The content type of every form.
pub fn content_type() -> String {
    format!("multipart/form-data; boundary={BOUNDARY}")
}

fn post(path: &str, body: Body) -> Request<Body> {
    Request::post(path).header(header::CONTENT_TYPE, content_type()).body(body).unwrap()
}

fn pieces(bytes: Vec<u8>) -> impl futures_util::Stream<Item = std::io::Result<Bytes>> {
    let bytes = Bytes::from(bytes);
    let starts: Vec<usize> = (0..bytes.len()).step_by(PIECE).collect();
    stream::iter(starts.into_iter().map(move |at| Ok(bytes.slice(at..bytes.len().min(at + PIECE)))))
}

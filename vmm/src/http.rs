//! As much HTTP/1.1 as the control API needs, over a Unix stream socket.
//!
//! In: bytes from a peer who may send anything. Out: a [`Request`] or a [`Response`], or an [`HttpError`] with the
//! status to answer. Holds: a message takes at most [`HEAD_MAX`] + [`BODY_MAX`] bytes of memory and, once begun, at most
//! [`Connection`]'s time to arrive.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The longest request or status line with its headers, in bytes.
pub const HEAD_MAX: usize = 8 * 1024;
/// The longest body, in bytes.
pub const BODY_MAX: usize = 64 * 1024;
/// The most headers.
const HEADERS_MAX: usize = 32;

/// A request, its body read in full.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// The method, as sent.
    pub method: String,
    /// The request target, as sent.
    pub path: String,
    /// The body; empty if there is none.
    pub body: Vec<u8>,
    /// Whether the peer wants to send another request on this connection.
    pub keep_alive: bool,
}

/// A response, its body read in full.
#[derive(Debug, PartialEq, Eq)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body; empty if there is none.
    pub body: Vec<u8>,
}

/// Why there is no message.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// The peer sent something that isn't taken; answer this status with this message, and close.
    #[error("{message}")]
    Refused {
        /// The status code to answer.
        status: u16,
        /// What was wrong and what was expected, in one line.
        message: String,
    },
    /// The peer didn't send a whole message in time.
    #[error("no whole HTTP message came in time")]
    TimedOut,
    /// The connection failed, or ended in the middle of a message.
    #[error(transparent)]
    Io(#[from] io::Error),
}

fn refused(status: u16, message: impl Into<String>) -> HttpError {
    HttpError::Refused { status, message: message.into() }
}

/// The first lines of a message.
struct Head {
    /// Bytes up to and with the empty line.
    length: usize,
    first: FirstLine,
    body_length: usize,
    keep_alive: bool,
}

enum FirstLine {
    Request { method: String, path: String },
    Status(u16),
}

/// One side of a connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// Bytes received and not yet used.
    received: Vec<u8>,
    /// How long a message may take from its first byte.
    message_time: Duration,
}

impl Connection {
    /// A connection on which a message, once begun, may take `message_time` to arrive or to be taken by the peer.
    ///
    /// # Errors
    /// The stream would not have the time limit.
    pub fn new(stream: UnixStream, message_time: Duration) -> io::Result<Self> {
        stream.set_write_timeout(Some(message_time))?;
        Ok(Self { stream, received: Vec::new(), message_time })
    }

    /// The next request; none if the peer has closed the connection, or sent nothing for `idle`.
    ///
    /// # Errors
    /// What arrived is no request that is taken here.
    pub fn request(&mut self, idle: Duration) -> Result<Option<Request>, HttpError> {
        if self.received.is_empty() {
            match self.receive(Instant::now() + idle) {
                Ok(true) => {}
                Ok(false) | Err(HttpError::TimedOut) => return Ok(None),
                Err(e) => return Err(e),
            }
        }
        let (head, body) = self.message(request_head)?;
        match head.first {
            FirstLine::Request { method, path } => {
                Ok(Some(Request { method, path, body, keep_alive: head.keep_alive }))
            }
            FirstLine::Status(_) => Err(refused(400, "expected a request, not a status line")),
        }
    }

    /// The response to a request just sent, waiting up to `patience` for its first byte.
    ///
    /// # Errors
    /// No response came, or what came is none.
    pub fn response(&mut self, patience: Duration) -> Result<Response, HttpError> {
        self.receive_more(Instant::now() + patience)?;
        let (head, body) = self.message(response_head)?;
        match head.first {
            FirstLine::Status(status) => Ok(Response { status, body }),
            FirstLine::Request { .. } => Err(refused(400, "expected a status line, not a request")),
        }
    }

    /// Sends a request with a JSON body, or with none.
    ///
    /// # Errors
    /// The peer is gone, or took too long.
    pub fn send_request(&mut self, method: &str, path: &str, body: &[u8]) -> io::Result<()> {
        self.send(&format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close"), body)
    }

    /// Sends a response with a JSON body, or with none.
    ///
    /// # Errors
    /// The peer is gone, or took too long.
    pub fn send_response(&mut self, status: u16, body: &[u8], keep_alive: bool) -> io::Result<()> {
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let reason = reason(status);
        self.send(&format!("HTTP/1.1 {status} {reason}\r\nConnection: {connection}"), body)
    }

    fn send(&mut self, head: &str, body: &[u8]) -> io::Result<()> {
        let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
        // A 204 must not have a length (RFC 9110, 8.6).
        let length = if head.starts_with("HTTP/1.1 204") {
            String::new()
        } else {
            format!("Content-Length: {}\r\n", body.len())
        };
        let mut message = format!("{head}\r\n{kind}{length}\r\n").into_bytes();
        message.extend_from_slice(body);
        self.stream.write_all(&message)
    }

    fn message(&mut self, parse: ParseHead) -> Result<(Head, Vec<u8>), HttpError> {
        let deadline = Instant::now() + self.message_time;
        let head = loop {
            if let Some(head) = parse(&self.received)? {
                break head;
            }
            self.receive_more(deadline)?;
        };
        let end = head.length + head.body_length;
        while self.received.len() < end {
            self.receive_more(deadline)?;
        }
        let rest = self.received.split_off(end);
        let body = std::mem::replace(&mut self.received, rest).split_off(head.length);
        Ok((head, body))
    }

    fn receive_more(&mut self, deadline: Instant) -> Result<(), HttpError> {
        if self.receive(deadline)? { Ok(()) } else { Err(closed().into()) }
    }

    /// Takes what has arrived; false if the peer has closed its end.
    fn receive(&mut self, deadline: Instant) -> Result<bool, HttpError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(HttpError::TimedOut);
        }
        self.stream.set_read_timeout(Some(left))?;
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(count) => {
                self.received.extend_from_slice(&buffer[..count]);
                Ok(count > 0)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(HttpError::TimedOut),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => self.receive(deadline),
            Err(e) => Err(e.into()),
        }
    }
}

fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed in the middle of a message")
}

type ParseHead = fn(&[u8]) -> Result<Option<Head>, HttpError>;

fn request_head(bytes: &[u8]) -> Result<Option<Head>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let Some(length) = parsed(request.parse(bytes), bytes.len())? else { return Ok(None) };
    let (Some(method), Some(path)) = (request.method, request.path) else { return Ok(None) };
    let first = FirstLine::Request { method: method.into(), path: path.into() };
    head(length, first, request.version == Some(1), request.headers).map(Some)
}

fn response_head(bytes: &[u8]) -> Result<Option<Head>, HttpError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let Some(length) = parsed(response.parse(bytes), bytes.len())? else { return Ok(None) };
    let Some(status) = response.code else { return Ok(None) };
    head(length, FirstLine::Status(status), false, response.headers).map(Some)
}

fn parsed(status: httparse::Result<usize>, received: usize) -> Result<Option<usize>, HttpError> {
    match status {
        Ok(httparse::Status::Complete(length)) if length <= HEAD_MAX => Ok(Some(length)),
        Ok(httparse::Status::Partial) if received < HEAD_MAX => Ok(None),
        Ok(_) => Err(refused(431, format!("the headers are longer than {HEAD_MAX} bytes"))),
        Err(httparse::Error::TooManyHeaders) => {
            Err(refused(431, format!("there are more than {HEADERS_MAX} headers")))
        }
        Err(e) => Err(refused(400, format!("not HTTP/1.1: {e}"))),
    }
}

fn head(
    length: usize,
    first: FirstLine,
    mut keep_alive: bool,
    headers: &[httparse::Header<'_>],
) -> Result<Head, HttpError> {
    let mut body_length = None;
    for header in headers {
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" if body_length.is_some() => {
                return Err(refused(400, "there is more than one Content-Length"));
            }
            "content-length" => body_length = Some(content_length(header.value)?),
            "transfer-encoding" => {
                return Err(refused(501, "Transfer-Encoding is not supported: send a Content-Length"));
            }
            "expect" => return Err(refused(417, "Expect is not supported: send the body at once")),
            "connection" if header.value.eq_ignore_ascii_case(b"close") => keep_alive = false,
            "connection" if header.value.eq_ignore_ascii_case(b"keep-alive") => keep_alive = true,
            _ => {}
        }
    }
    Ok(Head { length, first, body_length: body_length.unwrap_or(0), keep_alive })
}

fn content_length(value: &[u8]) -> Result<usize, HttpError> {
    let digits = std::str::from_utf8(value).ok().filter(|v| v.bytes().all(|b| b.is_ascii_digit()));
    let Some(digits) = digits.filter(|d| !d.is_empty()) else {
        return Err(refused(400, "Content-Length is not a number"));
    };
    // More digits than fit is a number that is too large.
    match digits.parse() {
        Ok(length) if length <= BODY_MAX => Ok(length),
        _ => Err(refused(413, format!("the body is longer than {BODY_MAX} bytes"))),
    }
}

/// The reason phrase of each status that is sent here (RFC 9110, 15).
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests;

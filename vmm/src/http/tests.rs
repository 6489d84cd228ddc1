use super::*;

const SOON: Duration = Duration::from_millis(100);

/// What the server's end makes of these bytes, after which the peer says no more.
fn received(bytes: &[u8]) -> Result<Option<Request>, HttpError> {
    let (mut peer, stream) = UnixStream::pair().unwrap();
    peer.write_all(bytes).unwrap();
    peer.shutdown(std::net::Shutdown::Write).unwrap();
    Connection::new(stream, SOON).unwrap().request(SOON)
}

fn status_for(bytes: &[u8]) -> u16 {
    match received(bytes) {
        Err(HttpError::Refused { status, .. }) => status,
        other => panic!("expected a refusal, not {other:?}"),
    }
}

#[test]
fn a_request_with_a_body_is_read_whole() {
    let request = received(b"PUT /x HTTP/1.1\r\nHost: a\r\ncontent-length: 3\r\n\r\nabc").unwrap().unwrap();
    assert_eq!((request.method.as_str(), request.path.as_str()), ("PUT", "/x"));
    assert_eq!((request.body.as_slice(), request.keep_alive), (&b"abc"[..], true));
}

#[test]
fn requests_on_one_connection_follow_each_other() {
    let (mut peer, stream) = UnixStream::pair().unwrap();
    peer.write_all(b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let mut connection = Connection::new(stream, SOON).unwrap();
    let first = connection.request(SOON).unwrap().unwrap();
    let second = connection.request(SOON).unwrap().unwrap();
    assert_eq!((first.path.as_str(), first.keep_alive), ("/1", true));
    assert_eq!((second.path.as_str(), second.keep_alive), ("/2", false));
}

#[test]
fn http_1_0_closes_unless_asked_to_keep() {
    assert!(!received(b"GET / HTTP/1.0\r\n\r\n").unwrap().unwrap().keep_alive);
    assert!(received(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").unwrap().unwrap().keep_alive);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    assert_eq!(status_for(b"\x16\x03\x01 hello\r\n\r\n"), 400);
    assert_eq!(status_for(b"PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n"), 400);
    assert_eq!(status_for(b"PUT / HTTP/1.1\r\nContent-Length:\r\n\r\n"), 400);
    assert_eq!(status_for(b"PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"), 400);
    assert_eq!(status_for(b"PUT / HTTP/1.1\r\nContent-Length: 65537\r\n\r\n"), 413);
    assert_eq!(status_for(b"PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n"), 413);
    assert_eq!(status_for(b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), 501);
    assert_eq!(status_for(b"PUT / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n"), 417);
}

#[test]
fn endless_headers_are_refused() {
    let one_long = format!("GET / HTTP/1.1\r\nX: {}", "y".repeat(2 * HEAD_MAX));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(HEADERS_MAX + 1));
    assert_eq!(status_for(one_long.as_bytes()), 431);
    assert_eq!(status_for(many.as_bytes()), 431);
}

#[test]
fn a_message_cut_short_is_an_error_and_silence_is_not() {
    let whole = b"PUT / HTTP/1.1\r\nContent-Length: 2\r\n\r\nab";
    assert!(received(b"").unwrap().is_none());
    for length in 1..whole.len() {
        assert!(matches!(received(&whole[..length]), Err(HttpError::Io(_))), "{length} bytes");
    }
    assert!(received(whole).unwrap().is_some());
}

#[test]
fn a_peer_that_dawdles_is_cut_off() {
    let (mut peer, stream) = UnixStream::pair().unwrap();
    peer.write_all(b"GET / HT").unwrap();
    let mut connection = Connection::new(stream, SOON).unwrap();
    let begun = Instant::now();
    assert!(matches!(connection.request(SOON), Err(HttpError::TimedOut)));
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_response_comes_back_as_it_was_sent() {
    let (server, client) = UnixStream::pair().unwrap();
    let (mut server, mut client) =
        (Connection::new(server, SOON).unwrap(), Connection::new(client, SOON).unwrap());
    for (status, body) in [(200, &b"{}"[..]), (204, b""), (409, br#"{"error":"x"}"#)] {
        client.send_request("PUT", "/x", body).unwrap();
        assert_eq!(server.request(SOON).unwrap().unwrap().body, body);
        server.send_response(status, body, true).unwrap();
        assert_eq!(client.response(SOON).unwrap(), Response { status, body: body.into() });
    }
}

#[test]
fn no_answer_is_a_timeout_and_a_closed_connection_an_error() {
    let (server, client) = UnixStream::pair().unwrap();
    let mut client = Connection::new(client, SOON).unwrap();
    assert!(matches!(client.response(SOON), Err(HttpError::TimedOut)));
    drop(server);
    assert!(matches!(client.response(SOON), Err(HttpError::Io(_))));
}

use super::*;
use std::collections::BTreeSet;

const OPENAPI: &str = include_str!("../../../docs/openapi.yaml");

/// The keys of a YAML document that nests mappings by two spaces, as paths such as `paths/…/get`.
fn keys(document: &str) -> BTreeSet<Vec<String>> {
    let mut keys = BTreeSet::new();
    let mut path: Vec<String> = Vec::new();
    for line in document.lines() {
        let text = line.trim_start();
        let Some(key) = key_of(text) else { continue };
        path.truncate((line.len() - text.len()) / 2);
        path.push(key.to_owned());
        keys.insert(path.clone());
    }
    keys
}

fn key_of(text: &str) -> Option<&str> {
    if text.starts_with(['#', '-']) {
        return None;
    }
    text.strip_suffix(':').or_else(|| text.split_once(": ").map(|(key, _)| key))
}

fn below(prefix: &[&str]) -> BTreeSet<String> {
    let matches =
        |path: &&Vec<String>| path.len() == prefix.len() + 1 && path.iter().zip(prefix).all(|(a, b)| a == b);
    keys(OPENAPI).iter().filter(matches).map(|path| path[prefix.len()].clone()).collect()
}

fn fields(value: &impl Serialize) -> BTreeSet<String> {
    serde_json::to_value(value).unwrap().as_object().unwrap().keys().cloned().collect()
}

fn status() -> Status {
    Status {
        name: "web".into(),
        state: RunState::Paused,
        vcpus: 2,
        memory_bytes: 1 << 28,
        kernel: Some("6.1".into()),
        started_from: "/boot/vmlinuz".into(),
        balloon: Some(balloon()),
        uptime_seconds: 1.5,
        pid: 7,
        version: "0.1.0".into(),
        vsock: Some("/run/v.sock".into()),
        networks: vec![network()],
    }
}

fn network() -> NetworkStatus {
    NetworkStatus { id: "net0".into(), tap: "tap0".into(), mac: "02:00:00:00:00:07".into() }
}

fn balloon() -> BalloonStatus {
    BalloonStatus { target_bytes: 2 << 20, actual_bytes: 1 << 20 }
}

fn summary() -> SnapshotSummary {
    SnapshotSummary {
        path: "/tmp/a.snap".into(),
        memory_bytes: 1 << 28,
        stored_bytes: 1 << 20,
        vmcoreinfo: true,
        pause_ms: None,
        total_ms: 12.5,
    }
}

fn boot() -> BootRequest {
    BootRequest {
        kernel: "/boot/b".into(),
        initrd: Some("/boot/initrd".into()),
        cmdline: "quiet".into(),
        memory_bytes: Some(1 << 28),
        vcpus: Some(2),
        name: Some("b".into()),
        share_disks: true,
        image: Some(ImageRequest { write_to: Some("/tmp/image".into()) }),
    }
}

fn switch_to(boot: BootRequest) -> SwitchRequest {
    SwitchRequest { boot: Some(boot), ..SwitchRequest::default() }
}

fn switch_back() -> SwitchRequest {
    SwitchRequest {
        to: Some("a".into()),
        boot: None,
        snapshot: None,
        keep_in: Some("/tmp/b.snap".into()),
        time: SleptTime::Freeze,
        trial: true,
    }
}

fn kept() -> KeptKernel {
    KeptKernel { path: "/tmp/b.snap".into(), name: Some("b".into()), share_disks: true }
}

fn switch_to_kept(kept: KeptKernel) -> SwitchRequest {
    SwitchRequest { snapshot: Some(kept), ..SwitchRequest::default() }
}

fn switched() -> SwitchSummary {
    SwitchSummary { from: "a".into(), from_ended: false, to: "b".into(), pause_ms: 12.25, saved_ms: 0.0 }
}

fn kernel() -> KernelStatus {
    KernelStatus {
        name: "a".into(),
        version: Some("6.1.0-9 (someone) #1".into()),
        asleep: true,
        memory_bytes: 1 << 28,
        resident_bytes: 1 << 20,
        asleep_seconds: 1.5,
        kept_in: Some("/tmp/a.snap".into()),
        beside: false,
        vsock: None,
        ended: None,
        on_trial: false,
    }
}

fn snapshot(path: &str, then: Option<Then>) -> Command {
    Command::Snapshot(SnapshotRequest {
        path: path.into(),
        then,
        with_disks: false,
        digest_disks: false,
        parent: None,
        track: false,
        key: None,
        live: false,
        kernel: None,
    })
}

#[test]
fn the_document_has_the_router_s_paths_and_methods_and_no_others() {
    let documented: BTreeSet<(String, String)> = below(&["paths"])
        .iter()
        .flat_map(|path| below(&["paths", path]).into_iter().map(move |method| (method, path.clone())))
        .collect();
    let routed = ENDPOINTS.iter().map(|(method, path, _)| (method.to_lowercase(), (*path).to_owned()));
    assert_eq!(documented, routed.collect());
}

#[test]
fn the_document_has_the_types_fields_and_no_others() {
    let properties = |schema| below(&["components", "schemas", schema, "properties"]);
    let request = SnapshotRequest {
        path: "/a".into(),
        then: Some(Then::Resume),
        with_disks: true,
        digest_disks: true,
        parent: Some("/p".into()),
        track: true,
        key: Some("/k".into()),
        live: true,
        kernel: Some("b".into()),
    };
    assert_eq!(properties("Status"), fields(&status()));
    assert_eq!(properties("SnapshotSummary"), fields(&summary()));
    assert_eq!(properties("SnapshotRequest"), fields(&request));
    assert_eq!(properties("DumpRequest"), fields(&DumpRequest { path: "/a".into() }));
    assert_eq!(properties("Balloon"), fields(&balloon()));
    assert_eq!(properties("BalloonRequest"), fields(&BalloonRequest { target_bytes: 0 }));
    let switch = SwitchRequest { boot: Some(boot()), snapshot: Some(kept()), ..switch_back() };
    assert_eq!(properties("SwitchRequest"), fields(&switch));
    assert_eq!(properties("BootRequest"), fields(&boot()));
    assert_eq!(properties("KeptKernel"), fields(&kept()));
    assert_eq!(properties("ImageRequest"), fields(&boot().image.unwrap()));
    assert_eq!(properties("ForgetRequest"), fields(&ForgetRequest { name: String::new() }));
    assert_eq!(properties("StopRequest"), fields(&StopRequest::default()));
    assert_eq!(properties("SwitchSummary"), fields(&switched()));
    assert_eq!(properties("KernelList"), fields(&KernelList { kernels: vec![kernel()] }));
    assert_eq!(properties("Kernel"), fields(&kernel()));
    let acceptance = Acceptance { written_bytes: 0, total_ms: 0.0 };
    assert_eq!(properties("Acceptance"), fields(&acceptance));
    assert_eq!(properties("Error"), fields(&ErrorBody { error: String::new() }));
}

#[test]
fn each_operation_is_at_its_own_place_in_the_table() {
    for (index, (_, _, operation)) in ENDPOINTS.iter().enumerate() {
        assert_eq!(*operation as usize, index);
    }
}

#[test]
fn a_command_survives_the_way_through_http() {
    let snapshots = [None, Some(Then::Resume), Some(Then::Pause), Some(Then::Stop)]
        .map(|then| snapshot("/tmp/a b.snap", then));
    let balloon = Command::Balloon(BalloonRequest { target_bytes: 1 << 20 });
    let prepare = Command::Prepare(BootRequest { image: None, ..boot() });
    let others = [
        prepare,
        Command::Accept,
        Command::Status,
        Command::Progress,
        Command::Pause,
        Command::Resume,
        Command::Kernels,
        balloon,
    ];
    let dump = Command::Dump(DumpRequest { path: "/tmp/dump".into() });
    let stops = [false, true].map(|all| Command::Stop(StopRequest { all }));
    let forget = Command::Forget(ForgetRequest { name: "old".into() });
    let switches = [switch_back(), switch_to(boot()), switch_to_kept(kept())].map(Command::Switch);
    for wanted in snapshots.into_iter().chain(others).chain(stops).chain([forget, dump]).chain(switches) {
        let (method, path, body) = request(&wanted).unwrap();
        assert_eq!(command(method, path, &body), Ok(wanted));
    }
}

#[test]
fn a_stop_without_a_body_ends_one_kernel() {
    let stop = Command::Stop(StopRequest { all: false });
    assert_eq!(command("PUT", "/api/v1/vm.stop", b""), Ok(stop));
}

#[test]
fn a_switch_is_to_one_kernel_whose_files_are_absolute() {
    let refused = |request: &SwitchRequest| {
        let body = serde_json::to_vec(request).unwrap();
        command("PUT", "/api/v1/vm.switch", &body).unwrap_err()
    };
    let both = SwitchRequest { boot: Some(boot()), ..switch_back() };
    let all = SwitchRequest { snapshot: Some(kept()), ..both.clone() };
    for request in [both, all, SwitchRequest::default()] {
        assert_eq!(refused(&request), ApiError::bad_request("expected one of `to`, `boot` and `snapshot`"));
    }
    let relative = [
        switch_to(BootRequest { kernel: "b".into(), ..boot() }),
        switch_to(BootRequest { initrd: Some("b".into()), ..boot() }),
        switch_to(BootRequest { image: Some(ImageRequest { write_to: Some("b".into()) }), ..boot() }),
        SwitchRequest { keep_in: Some("b".into()), ..switch_back() },
        switch_to_kept(KeptKernel { path: "b".into(), ..kept() }),
    ];
    for request in relative {
        assert_eq!(refused(&request), ApiError::bad_request("path must be absolute: b"));
    }
}

#[test]
fn after_a_snapshot_the_vm_does_what_it_did_before_unless_told_otherwise() {
    let body = br#"{"path": "/tmp/a.snap"}"#;
    assert_eq!(command("PUT", "/api/v1/vm.snapshot", body), Ok(snapshot("/tmp/a.snap", None)));
}

#[test]
fn what_fits_no_route_is_refused_with_the_right_status() {
    let refused = |method, path, body: &str| command(method, path, body.as_bytes()).unwrap_err().status;
    assert_eq!(refused("GET", "/", ""), 404);
    assert_eq!(refused("GET", "/api/v1/vm.info?x", ""), 404);
    assert_eq!(refused("PUT", "/api/v1/vm.info", ""), 405);
    assert_eq!(refused("GET", "/api/v1/vm.stop", ""), 405);
    assert_eq!(refused("PUT", "/api/v1/vm.pause", "{}"), 400);
    assert_eq!(refused("PUT", "/api/v1/vm.stop", r#"{"every":1}"#), 400);
    for body in ["", "x", "{}", "[]", r#"{"path":""}"#, r#"{"path":"a"}"#, r#"{"path":1}"#] {
        assert_eq!(refused("PUT", "/api/v1/vm.snapshot", body), 400, "{body}");
        assert_eq!(refused("PUT", "/api/v1/vm.dump", body), 400, "{body}");
    }
    let live = [
        r#"{"path":"/a","live":true,"then":"stop"}"#,
        r#"{"path":"/a","live":true,"digest_disks":true}"#,
        r#"{"path":"/a","parent":"b"}"#,
        r#"{"path":"/a","key":"k"}"#,
    ];
    for body in [r#"{"path":"/a","then":"sleep"}"#, r#"{"path":"/a","extra":1}"#].into_iter().chain(live) {
        assert_eq!(refused("PUT", "/api/v1/vm.snapshot", body), 400, "{body}");
    }
}

#[test]
fn answers_are_json() {
    assert_eq!(response(&Ok(Reply::Done)), (204, vec![]));
    let (code, body) = response(&Ok(Reply::Status(status())));
    assert_eq!((code, serde_json::from_slice::<Status>(&body).unwrap()), (200, status()));
    let (code, body) = response(&Err(ApiError::conflict("it is \"paused\"")));
    assert_eq!((code, body.as_slice()), (409, &br#"{"error":"it is \"paused\""}"#[..]));
}

#[test]
fn a_switch_and_a_list_of_kernels_are_told_in_lines() {
    assert_eq!(switched().to_string(), "a sleeps, b runs after 12.2 ms");
    let left = SwitchSummary { from_ended: true, ..switched() };
    assert_eq!(left.to_string(), "a ended, b runs after 12.2 ms");
    let list = KernelList { kernels: vec![KernelStatus { asleep: false, ..kernel() }, kernel()] };
    let text = "a: 6.1.0-9, 1.0 MiB of 256.0 MiB held, awake\na: 6.1.0-9, 1.0 MiB of 256.0 MiB held, asleep for 1.5 s in /tmp/a.snap";
    assert_eq!(list.to_string(), text);
}

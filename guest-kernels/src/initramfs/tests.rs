use super::*;

type Read = (String, u32, (u32, u32), Vec<u8>);

fn archive(initramfs: &Initramfs) -> Vec<u8> {
    let mut out = Vec::new();
    initramfs.write_to(&mut out).unwrap();
    out
}

/// A reader of its own, after buffer-format.rst: 110 bytes of ASCII header, name and data each padded to 4 bytes.
fn read(archive: &[u8]) -> Vec<Read> {
    let (mut at, mut entries) = (0, Vec::new());
    loop {
        assert_eq!(&archive[at..at + 6], b"070701");
        let field = |n: usize| {
            let digits = &archive[at + 6 + 8 * n..at + 14 + 8 * n];
            u32::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap()
        };
        let (size, name_size) = (field(6) as usize, field(11) as usize);
        let name = String::from_utf8(archive[at + 110..at + 109 + name_size].to_vec()).unwrap();
        let data = (at + 110 + name_size).next_multiple_of(4);
        if name == "TRAILER!!!" {
            return entries;
        }
        let bytes = archive[data..data + size].to_vec();
        assert_eq!(field(5), 0, "{name} has a time");
        entries.push((name, field(1), (field(9), field(10)), bytes));
        at = (data + size).next_multiple_of(4);
    }
}

#[test]
fn what_goes_in_is_read_back() {
    let source = tempfile::NamedTempFile::new().unwrap();
    fs::write(source.path(), "from a file").unwrap();
    fs::set_permissions(source.path(), fs::Permissions::from_mode(0o750)).unwrap();
    let mut initramfs = Initramfs::default();
    initramfs.file("/a/b/c", 0o640, "text").symlink("a/link", "b/c");
    initramfs.device("dev/null", CHARACTER_DEVICE | 0o666, 1, 3).copy("x", source.path()).unwrap();
    let node =
        |name: &str, mode, device, data: &str| (name.to_owned(), mode, device, data.as_bytes().to_vec());
    let expected = [
        node("a", 0o040_755, (0, 0), ""),
        node("a/b", 0o040_755, (0, 0), ""),
        node("a/b/c", 0o100_640, (0, 0), "text"),
        node("a/link", 0o120_777, (0, 0), "b/c"),
        node("dev", 0o040_755, (0, 0), ""),
        node("dev/null", 0o020_666, (1, 3), ""),
        node("x", 0o100_750, (0, 0), "from a file"),
    ];
    assert_eq!(read(&archive(&initramfs)), expected);
}

#[test]
fn the_order_of_adding_does_not_show() {
    let mut one = Initramfs::new();
    one.file("a", 0o644, "1").file("b/c", 0o644, "2");
    let mut other = Initramfs::default();
    other.file("b/c", 0o644, "2").file("a", 0o644, "1");
    other.entries.extend(Initramfs::new().entries);
    assert_eq!(archive(&one), archive(&other));
}

#[test]
fn in_the_cache_it_is_of_whole_pages() {
    let initramfs = Initramfs::new();
    let (padded, bare) = (initramfs.pages().unwrap(), archive(&initramfs));
    assert_eq!(padded.len(), bare.len().next_multiple_of(4096));
    assert_ne!(padded.len(), bare.len());
    assert_eq!(read(&padded), read(&bare));
}

#[test]
fn a_directory_does_not_go_in_as_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let error = Initramfs::new().copy("x", dir.path()).unwrap_err().to_string();
    assert!(error.contains("it is no regular file"), "{error}");
}

fn module(name: &str, depends: &[&str], aliases: &[&str]) -> Module {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let (depends, aliases) = (owned(depends), owned(aliases));
    Module { name: name.to_owned(), depends, aliases, bytes: Vec::new() }
}

#[test]
fn modules_dep_names_all_needs_nearest_first() {
    let order = [
        module("irqbypass", &[], &[]),
        module("kvm", &["irqbypass"], &[]),
        module("kvm_amd", &["kvm", "ccp"], &[]),
    ];
    let expected = "irqbypass.ko:\nkvm.ko: irqbypass.ko\nkvm_amd.ko: kvm.ko irqbypass.ko\n";
    assert_eq!(modules_dep(&order), expected);
}

#[test]
fn modules_alias_has_a_line_for_each_pattern() {
    let order = [module("virtio", &[], &[]), module("virtio_blk", &["virtio"], &["virtio:d2v*", "x"])];
    assert_eq!(modules_alias(&order), "alias virtio:d2v* virtio_blk\nalias x virtio_blk\n");
}

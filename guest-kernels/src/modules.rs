//! Kernel modules with what they depend on, ready for `insmod`.
//!
//! In: a kernel's module directory and module names. Out: unpacked modules in load order, each after what it needs.
//! Holds: a name that the kernel has built in yields nothing; a name it doesn't know is an error.
//!
//! The packages come without `modules.dep`, so dependencies are read from the modules' own `.modinfo` sections.

use crate::stock::StockKernel;
use anyhow::{Context, Result, bail};
use object::{Object, ObjectSection};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Ends a signed module.
const SIGNATURE_MAGIC: &[u8] = b"~Module signature appended~\n";

/// A kernel module, unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// Names of the modules it needs, with underscores.
    pub depends: Vec<String>,
    /// Patterns of the devices and protocols that it is for, `virtio:d00000002v*` for example.
    pub aliases: Vec<String>,
    /// The ELF object, as the kernel takes it, without Debian's signature.
    pub bytes: Vec<u8>,
}

/// The modules with these names (`-` and `_` are the same) and all that they need, in an order in which `insmod` takes
/// them. What is built into the kernel is left out.
///
/// # Errors
/// The kernel has no such module, or a module can't be read.
pub fn load_order(kernel: &StockKernel, names: &[&str]) -> Result<Vec<Module>> {
    let tree = Tree::open(&kernel.modules)?;
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for name in names {
        visit(&normal(name), &mut seen, &mut order, &mut |name| tree.load(name))
            .with_context(|| format!("kernel {}", kernel.release))?;
    }
    Ok(order)
}

/// Appends `name` to `order` after what it needs.
fn visit(
    name: &str,
    seen: &mut BTreeSet<String>,
    order: &mut Vec<Module>,
    load: &mut impl FnMut(&str) -> Result<Option<Module>>,
) -> Result<()> {
    if !seen.insert(name.to_owned()) {
        return Ok(());
    }
    let Some(module) = load(name)? else { return Ok(()) };
    for dependency in &module.depends {
        visit(dependency, seen, order, load)?;
    }
    order.push(module);
    Ok(())
}

/// What a kernel has: module files by name, and the names of what is built in.
struct Tree {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Tree {
    fn open(dir: &Path) -> Result<Tree> {
        let mut files = BTreeMap::new();
        collect(&dir.join("kernel"), &mut files)?;
        let builtin = dir.join("modules.builtin");
        let builtin =
            fs::read_to_string(&builtin).with_context(|| format!("cannot read {}", builtin.display()))?;
        let builtin = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Tree { files, builtin })
    }

    fn load(&self, name: &str) -> Result<Option<Module>> {
        let Some(path) = self.files.get(name) else {
            if self.builtin.contains(name) {
                return Ok(None);
            }
            bail!("there is no module \"{name}\"");
        };
        let mut bytes = unpack(path).with_context(|| format!("cannot read {}", path.display()))?;
        bytes.truncate(bytes.len() - signature_len(&bytes));
        let modinfo = modinfo(&bytes).with_context(|| format!("{} is no kernel module", path.display()))?;
        let (depends, aliases) = (parse_depends(modinfo), parse_aliases(modinfo));
        Ok(Some(Module { name: name.to_owned(), depends, aliases, bytes }))
    }
}

fn collect(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some(name) = module_name(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `kernel/…/kvm-amd.ko.xz` is `kvm_amd`; what is no module has no name.
fn module_name(path: &Path) -> Option<String> {
    let (stem, packing) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(packing, "" | ".xz" | ".zst").then(|| normal(stem))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn unpack(path: &Path) -> Result<Vec<u8>> {
    let packed = fs::read(path)?;
    let mut bytes = Vec::new();
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => lzma_rust2::XzReader::new(&packed[..], false).read_to_end(&mut bytes)?,
        Some("zst") => zstd::Decoder::new(&packed[..])?.read_to_end(&mut bytes)?,
        _ => return Ok(packed),
    };
    Ok(bytes)
}

/// How many bytes at the end are the module's signature, which an emulated CPU takes seconds to check. Debian's kernels
/// load a module without one and set a taint flag.
///
/// The layout is that of `struct module_signature` in `include/linux/module_signature.h`: signature, 12 bytes of which
/// the last four are the signature's length (big-endian), magic.
fn signature_len(module: &[u8]) -> usize {
    let Some(rest) = module.strip_suffix(SIGNATURE_MAGIC) else { return 0 };
    let Some((_, len)) = rest.split_last_chunk() else { return 0 };
    let len = u32::from_be_bytes(*len) as usize + 12 + SIGNATURE_MAGIC.len();
    if len > module.len() { 0 } else { len }
}

/// A module's `.modinfo`, which is a list of NUL-terminated `key=value`.
fn modinfo(module: &[u8]) -> Result<&[u8]> {
    let elf = object::File::parse(module)?;
    Ok(elf.section_by_name(".modinfo").context("it has no .modinfo section")?.data()?)
}

fn values<'a>(modinfo: &'a [u8], key: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    modinfo.split(|&byte| byte == 0).filter_map(move |item| item.strip_prefix(key)?.strip_prefix(b"="))
}

fn parse_depends(modinfo: &[u8]) -> Vec<String> {
    let names = values(modinfo, b"depends").flat_map(|value| value.split(|&byte| byte == b','));
    names.filter(|name| !name.is_empty()).map(|name| normal(&String::from_utf8_lossy(name))).collect()
}

fn parse_aliases(modinfo: &[u8]) -> Vec<String> {
    values(modinfo, b"alias").map(|alias| String::from_utf8_lossy(alias).into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_found_by_its_magic_and_length() {
        let tail = |len: u32| [&b"algo and pad"[..8], &len.to_be_bytes(), SIGNATURE_MAGIC].concat();
        let signed = [b"module".as_slice(), b"sign", &tail(4)].concat();
        assert_eq!(signed.len() - signature_len(&signed), "module".len());
        assert_eq!(signature_len(b"module"), 0);
        assert_eq!(signature_len(&[b"module".as_slice(), &tail(1000)].concat()), 0);
        assert_eq!(signature_len(SIGNATURE_MAGIC), 0);
    }

    fn module(name: &str, depends: Vec<String>) -> Module {
        Module { name: name.to_owned(), depends, aliases: Vec::new(), bytes: Vec::new() }
    }

    #[test]
    fn a_module_comes_after_what_it_needs_and_only_once() {
        let needs = BTreeMap::from([
            ("kvm_amd", vec!["kvm", "ccp"]),
            ("kvm", vec!["irqbypass"]),
            ("kvm_intel", vec!["kvm"]),
            ("irqbypass", vec![]),
        ]);
        let mut load = |name: &str| {
            let depends = needs.get(name).map(|needs| needs.iter().map(|need| (*need).to_owned()).collect());
            Ok(depends.map(|depends| module(name, depends)))
        };
        let (mut seen, mut order) = (BTreeSet::new(), Vec::new());
        visit("kvm_amd", &mut seen, &mut order, &mut load).unwrap();
        visit("kvm_intel", &mut seen, &mut order, &mut load).unwrap();
        let names: Vec<_> = order.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, ["irqbypass", "kvm", "kvm_amd", "kvm_intel"]);
    }

    #[test]
    fn modules_that_need_each_other_do_not_hang() {
        let mut load = |name: &str| {
            let other = if name == "a" { "b" } else { "a" };
            Ok(Some(module(name, vec![other.to_owned()])))
        };
        let mut order = Vec::new();
        visit("a", &mut BTreeSet::new(), &mut order, &mut load).unwrap();
        assert_eq!(order.len(), 2);
    }

    #[test]
    fn dependencies_are_split_at_commas() {
        assert_eq!(parse_depends(b"license=GPL\0depends=kvm,a-b\0name=x\0"), ["kvm", "a_b"]);
        assert!(parse_depends(b"depends=\0").is_empty());
    }

    #[test]
    fn every_alias_counts() {
        let modinfo = b"alias=acpi*:LNRO0005:*\0aliases=no\0alias=virtio:d00000002v*\0depends=\0";
        assert_eq!(parse_aliases(modinfo), ["acpi*:LNRO0005:*", "virtio:d00000002v*"]);
    }

    #[test]
    fn a_modules_name_is_its_files() {
        assert_eq!(module_name(Path::new("kernel/x/kvm-amd.ko.xz")).as_deref(), Some("kvm_amd"));
        assert_eq!(module_name(Path::new("kernel/x/kvm.ko")).as_deref(), Some("kvm"));
        assert_eq!(module_name(Path::new("modules.order")), None);
    }
}

//! What stands before the images in a stream: whose they are, and what they ask for.
//!
//! In: lines, or what they tell. Out: the other. Holds: a stream that begins otherwise is refused before anything is unpacked.
//!
//! ```text
//! vmm-process 1
//! kernel=6.1.0-50-cloud-amd64      of the guest that it comes from
//! contained=false                  whether it was started by `vmm-checkpoint start`
//! pids=312,313                     the numbers it has outside of a container, the first process first
//! features=fxsr,sse,…              of the processor
//! registers=832                    bytes
//!                                  an empty line; a tar archive follows
//! ```

use crate::cpu::Processor;
use crate::criu::Tree;
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::io::Read;

const MAGIC: &str = "vmm-process 1\n";
/// No longer than this. A number takes eight bytes at most.
const MAX: usize = 1 << 20;

/// All that stands there.
#[derive(Debug)]
pub(crate) struct About {
    pub(crate) tree: Tree,
    /// All processes and threads, the first process first.
    pub(crate) pids: Vec<i32>,
    pub(crate) processor: Processor,
}

impl About {
    pub(crate) fn text(&self) -> String {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let pids: Vec<String> = self.pids.iter().map(i32::to_string).collect();
        let Processor { features, registers } = &self.processor;
        format!(
            "{MAGIC}kernel={release}\ncontained={}\npids={}\nfeatures={}\nregisters={registers}\n\n",
            self.tree.contained,
            pids.join(","),
            features.join(",")
        )
    }

    /// Reads up to the empty line and not a byte more, since the archive is somebody else's.
    pub(crate) fn read(stream: &mut impl Read) -> Result<About> {
        let mut text = Vec::new();
        while !text.ends_with(b"\n\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).ok().context("what came is no process: it ends too soon")?;
            text.push(byte[0]);
            let begins_well = text.iter().zip(MAGIC.as_bytes()).all(|(is, ought)| is == ought);
            ensure!(begins_well, "what came is no process, or was written by another vmm-checkpoint");
            ensure!(text.len() < MAX, "what came is no process: its description does not end");
        }
        let parsed = std::str::from_utf8(&text).ok().and_then(About::parse);
        parsed.context("what came is no process: its description makes no sense")
    }

    fn parse(text: &str) -> Option<About> {
        let fields = text.strip_prefix(MAGIC)?.lines();
        let fields: BTreeMap<&str, &str> = fields.filter_map(|line| line.split_once('=')).collect();
        let pids = fields.get("pids")?.split(',').map(|pid| pid.parse().ok().filter(|&pid| pid > 0));
        let pids: Vec<i32> = pids.collect::<Option<_>>()?;
        let contained = fields.get("contained")?.parse().ok()?;
        let features = fields.get("features")?.split(',').filter(|name| !name.is_empty()).map(str::to_owned);
        let registers = fields.get("registers")?.parse().ok()?;
        Some(About {
            tree: Tree { pid: *pids.first()?, contained },
            pids,
            processor: Processor { features: features.collect(), registers },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        let processor = Processor { features: vec!["sse2".to_owned(), "avx".to_owned()], registers: 832 };
        About { tree: Tree { pid: 7, contained: false }, pids: vec![7, 9, 12], processor }
    }

    #[test]
    fn what_is_in_a_stream_is_told_at_its_beginning_and_the_rest_is_left_alone() {
        let stream = [about().text().as_bytes(), b"archive"].concat();
        let mut rest = &stream[..];
        let read = About::read(&mut rest).unwrap();
        assert_eq!((read.tree.pid, read.tree.contained, &read.pids[..]), (7, false, &[7, 9, 12][..]));
        assert_eq!(read.processor, about().processor);
        assert_eq!(rest, b"archive");
    }

    #[test]
    fn what_begins_otherwise_or_does_not_end_is_refused() {
        let text = about().text();
        for (strange, why) in [
            (text.replace("vmm-process 1", "vmm-process 2"), "another vmm-checkpoint"),
            (text[..text.len() - 1].to_owned(), "ends too soon"),
            (text.replace("pids=7", "pids="), "makes no sense"),
            (text.replace("pids=7", "pids=-7"), "makes no sense"),
            (text.replace("registers=832", "registers=many"), "makes no sense"),
            (format!("{MAGIC}{}", "x".repeat(MAX)), "does not end"),
        ] {
            let said = About::read(&mut strange.as_bytes()).unwrap_err().to_string();
            assert!(said.contains(why), "{said}");
        }
    }
}

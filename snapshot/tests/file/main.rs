//! Snapshot files from outside: written, read, damaged, forged, and laid out anew as Linux does.
//!
//! In: small machines made of bytes. Out: what writer and reader make of them. Holds: each test can fail, and one that
//! lacks a program says so on the terminal.

mod machine;
mod forge;

mod round_trip;
mod tools;
mod disk_full;
mod damage;
mod sealed;
mod forged;
mod vmcore;
mod chain;
mod anything;

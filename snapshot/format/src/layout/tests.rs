use super::*;
use crate::elf;
use std::vec::Vec;

fn encode(headers: &[ProgramHeader]) -> Vec<u8> {
    let mut out = elf::encode_header(headers.len() as u16).to_vec();
    headers.iter().for_each(|header| out.extend(header.encode()));
    out
}

fn planned(layout: &Layout) -> Vec<u8> {
    encode(&layout.headers().collect::<Vec<_>>())
}

fn decode(bytes: &[u8]) -> Result<Layout, Fault> {
    Layout::decode(&elf::decode(bytes)?)
}

#[test]
fn decodes_what_it_plans() {
    let ranges = [RamRange { gpa: 0, len: 8192 }, RamRange { gpa: 1 << 32, len: 4096 }];
    let plan = Layout::plan(&ranges, 1000);
    assert_eq!(plan.ram()[0].offset, 4096);
    assert_eq!(plan.end(), 4096 + 8192 + 4096);
    let found = decode(&planned(&plan)).unwrap();
    assert_eq!((found.origin, &found.notes, found.ram()), (plan.origin, &plan.notes, plan.ram()));
}

#[test]
fn leaves_room_for_the_zeroed_note_header() {
    let ranges = [RamRange { gpa: 0, len: 4096 }];
    let headers_end = EHDR_LEN + 2 * PHDR_LEN;
    assert_eq!(Layout::plan(&ranges, 4096 - headers_end - 12).ram_start(), 4096);
    assert_eq!(Layout::plan(&ranges, 4096 - headers_end - 8).ram_start(), 8192);
}

#[test]
fn refuses_any_flipped_bit() {
    let plan = Layout::plan(&[RamRange { gpa: 0, len: 8192 }, RamRange { gpa: 1 << 32, len: 4096 }], 1000);
    let good = planned(&plan);
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let found = decode(&bad);
        assert!(found.is_err(), "bit {bit}: {found:?}");
    }
}

#[test]
fn the_last_address_and_the_direct_map_do_not_overflow() {
    let plan = Layout::plan(&[RamRange { gpa: GPA_END, len: 4096 }], 1000);
    let mut headers: Vec<_> = plan.headers().collect();
    headers[0].offset = PAGE_SIZE;
    headers[1].offset = 2 * PAGE_SIZE;
    headers[1].vaddr = DIRECT_MAP;
    assert!(decode(&encode(&headers)).is_err());
    headers[1].vaddr = DIRECT_MAP.wrapping_add(GPA_END);
    assert_eq!(decode(&encode(&headers)).unwrap().origin, Origin::Vmcore);
}

#[test]
fn packed_pages_are_decoded_as_planned_and_no_other_way() {
    for len in [0, 3 * PAGE_SIZE] {
        let plan = Layout::plan_packed(len, 1000);
        let found = decode(&planned(&plan)).unwrap();
        assert!(found.packed && found.origin == Origin::Writer);
        assert_eq!((found.ram(), found.chunks()), (plan.ram(), len.min(1)));
        assert_eq!(found.end(), 4096 + len);
        let good = planned(&plan);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // Another length is a layout too, which the file's length and the list of pages are held against.
            let other_len = decode(&bad).is_ok_and(|other| other.ram()[0].range.len != len);
            let at = bit / 8;
            assert!(decode(&bad).is_err() || other_len && (152..160).contains(&at), "bit {bit}");
        }
    }
}

#[test]
fn packed_pages_stand_alone_and_are_not_relayed() {
    let mut headers: Vec<_> = Layout::plan_packed(8192, 1000).headers().collect();
    headers.push(headers[1]);
    assert!(decode(&encode(&headers)).is_err(), "two of them");
    headers[1] = Layout::plan(&[RamRange { gpa: 0, len: 4096 }], 1000).headers().last().unwrap();
    assert!(decode(&encode(&headers)).is_err(), "beside RAM");
    headers.remove(1);
    headers[0].offset = PAGE_SIZE;
    headers[1].offset = 2 * PAGE_SIZE;
    assert!(decode(&encode(&headers)).is_err(), "after notes as Linux lays them out");
}

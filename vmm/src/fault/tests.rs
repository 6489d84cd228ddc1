use super::*;
use kvm_bindings::kvm_segment;

const CMPXCHG16B: &[u8] = &[0xf0, 0x48, 0x0f, 0xc7, 0x0f, 0xcc, 0xcc];

fn at(rip: u64) -> kvm_regs {
    kvm_regs { rip, rflags: 2, ..Default::default() }
}

fn long_mode() -> kvm_sregs {
    let cs = kvm_segment { l: 1, ..Default::default() };
    kvm_sregs { cs, cr0: CR0_PE | CR0_PG, efer: EFER_LMA, ..Default::default() }
}

fn emulation(data: &[u64]) -> Fault {
    Fault::Internal { suberror: 1, data: data.to_vec() }
}

/// Guest memory with these bytes at one linear address, and nothing elsewhere.
fn memory(at: u64, bytes: &'static [u8]) -> impl FnMut(u64, &mut [u8]) -> usize {
    move |address, buffer| {
        let bytes = if address == at { bytes } else { &[] };
        buffer[..bytes.len()].copy_from_slice(bytes);
        bytes.len()
    }
}

#[test]
fn an_instruction_that_kvm_lacks_is_named() {
    let rip = 0xffff_ffff_8100_0000;
    let text = describe(&emulation(&[]), &at(rip), &long_mode(), &mut memory(rip, CMPXCHG16B));
    assert_eq!(
        text,
        "this host's KVM cannot emulate a guest instruction (KVM_EXIT_INTERNAL_ERROR, suberror 1): RIP \
         0xffffffff81000000, long mode, CPL 0, paging on, `lock cmpxchg16b [rdi]` (f0 48 0f c7 0f)"
    );
}

#[test]
fn the_bytes_that_kvm_gives_are_preferred() {
    // Length 3, then 0f 01 ca: clac.
    let fault = emulation(&[1, 0xca01_0f03, 0]);
    let text = describe(&fault, &at(0x1000), &long_mode(), &mut memory(0x1000, CMPXCHG16B));
    assert!(text.ends_with("`clac` (0f 01 ca)"), "{text}");
}

#[test]
fn data_that_makes_no_sense_is_survived() {
    let words: [&[u64]; 5] = [&[1], &[1, 0], &[1, 0xff, 0], &[0, 0xca01_0f03, 0], &[u64::MAX; 16]];
    for data in words {
        for suberror in [0, 1, 2, 3, 4, u32::MAX] {
            let fault = Fault::Internal { suberror, data: data.to_vec() };
            let text = describe(&fault, &at(u64::MAX), &long_mode(), &mut |_, _| 0);
            assert!(text.contains("KVM_EXIT_INTERNAL_ERROR") && !text.contains('\n'), "{text}");
        }
    }
}

#[test]
fn data_is_shown_where_kvm_explains_itself_by_it() {
    let fault = Fault::Internal { suberror: 3, data: vec![0x8000_0b0d, 0x30] };
    let text = describe(&fault, &at(0), &long_mode(), &mut |_, _| 0);
    assert!(text.contains("could not be delivered"), "{text}");
    assert!(text.contains("suberror 3, data [0x80000b0d 0x30]"), "{text}");
}

#[test]
fn each_mode_is_told_and_decoded_in_its_own_way() {
    let code = |l, db| kvm_segment { l, db, base: 0x10_0000, ..Default::default() };
    let sregs = |cr0, efer, cs| kvm_sregs { cr0, efer, cs, ..Default::default() };
    let real = sregs(0, 0, code(0, 0));
    let protected = sregs(CR0_PE, 0, code(0, 1));
    let compatibility = sregs(CR0_PE | CR0_PG, EFER_LMA, code(0, 1));
    // b8 is `mov ax` or `mov eax`, by the mode; 40 is `inc` or a prefix.
    for (sregs, mode, instruction) in [
        (real, "real mode, ", "`mov ax,201h` (b8 01 02)"),
        (protected, "protected mode (32-bit), CPL 0, paging off", "`mov eax,4030201h` (b8 01 02 03 04)"),
        (compatibility, "long mode (32-bit code), CPL 0, paging on", "`mov eax,4030201h` (b8 01 02 03 04)"),
    ] {
        let bytes = &[0xb8, 1, 2, 3, 4];
        let text = describe(&emulation(&[]), &at(0x200), &sregs, &mut memory(0x10_0200, bytes));
        assert!(text.contains(mode) && text.ends_with(instruction), "{text}");
    }
}

#[test]
fn the_privilege_level_is_the_stack_segment_s() {
    let mut sregs = long_mode();
    sregs.ss.dpl = 3;
    assert!(describe(&emulation(&[]), &at(0), &sregs, &mut |_, _| 0).contains("CPL 3"));
}

#[test]
fn unreadable_memory_and_unknown_bytes_are_told_apart() {
    let nothing = describe(&emulation(&[]), &at(0), &long_mode(), &mut |_, _| 0);
    assert!(nothing.ends_with("where no guest memory can be read"), "{nothing}");
    let unknown = describe(&emulation(&[]), &at(0), &long_mode(), &mut memory(0, &[0x06, 0xff]));
    assert!(unknown.ends_with("no known instruction (06 ff)"), "{unknown}");
}

#[test]
fn a_shutdown_that_kvm_has_followed_by_a_reset_has_no_place() {
    let mut sregs = kvm_sregs::default();
    sregs.cs.base = 0xffff_0000;
    let text = describe(&Fault::Shutdown, &at(0xfff0), &sregs, &mut |_, _| 0);
    assert!(text.contains("triple fault") && text.contains("not known") && !text.contains("RIP"), "{text}");
    let text = describe(&Fault::Shutdown, &at(0x1234), &long_mode(), &mut |_, _| 0);
    assert!(text.contains("triple fault") && text.contains("RIP 0x1234"), "{text}");
}

#[test]
fn where_a_vcpu_stands_is_told_with_what_its_faults_depend_on() {
    let table = |base| kvm_bindings::kvm_dtable { base, limit: 0xfff, ..Default::default() };
    let sregs = kvm_sregs { cr2: 0xdead, cr3: 0x4000, gdt: table(0x5000), idt: table(0), ..long_mode() };
    let regs = kvm_regs { rsp: 0x7000, ..at(0xffff_ffff_8100_0000) };
    assert_eq!(
        place(1, &regs, &sregs),
        "vCPU 1: RIP 0xffffffff81000000, long mode, CPL 0, paging on; RSP 0x7000, CR2 0xdead, CR3 0x4000, \
         GDT 0x5000+0xfff, IDT 0x0+0xfff"
    );
    let mut reset = kvm_sregs::default();
    reset.cs.base = 0xffff_0000;
    let text = place(0, &at(0xfff0), &reset);
    assert!(text.starts_with("vCPU 0: as after a reset") && !text.contains("RIP"), "{text}");
}

#[test]
fn a_refused_entry_has_its_reason() {
    for (reason, word) in
        [(0x8000_0021, "invalid guest state"), (u64::MAX, "AMD"), (0x1234, "reason 0x1234)")]
    {
        let text = describe(&Fault::EntryFailed { reason }, &at(0), &long_mode(), &mut |_, _| 0);
        assert!(text.contains(word), "{text}");
    }
}

#[test]
fn the_exit_is_read_from_kvm_run() {
    let mut run = kvm_run { exit_reason: KVM_EXIT_INTERNAL_ERROR, ..Default::default() };
    run.__bindgen_anon_1.internal.suberror = 1;
    run.__bindgen_anon_1.internal.ndata = 1000;
    assert_eq!(Fault::of(&run), emulation(&[0; 16]));
    let run = kvm_run { exit_reason: 99, ..Default::default() };
    assert_eq!(Fault::of(&run), Fault::Unexpected { exit_reason: 99 });
}

#[test]
fn instructions_are_read_across_pages_as_far_as_they_are_mapped() {
    // Page 1 lies at 0x8000, page 2 isn't mapped.
    let mut translate = |address: u64| (address / PAGE_SIZE == 1).then(|| 0x8000 + address % PAGE_SIZE);
    let mut asked = Vec::new();
    let mut read = |gpa: u64, buffer: &mut [u8]| {
        asked.push((gpa, buffer.len()));
        true
    };
    assert_eq!(read_linear(0x1ffc, &mut [0; 15], &mut translate, &mut read), 4);
    assert_eq!(read_linear(0x2000, &mut [0; 15], &mut translate, &mut read), 0);
    assert_eq!(read_linear(u64::MAX, &mut [0; 15], &mut |_| Some(0), &mut |_, _| true), 15);
    assert_eq!(asked, [(0x8ffc, 4)]);
}

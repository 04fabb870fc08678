//! Reads what the drop tracer needs from the kernel's BTF: where struct members are, and names of an enum.
//!
//! Format: Documentation/bpf/btf.rst of the kernel.

const MAGIC: u16 = 0xeb9f;

const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_ENUM64: u32 = 19;

/// Types that only point on to another: typedef, volatile, const, restrict, type tag.
const MODIFIERS: [u32; 5] = [8, 9, 10, 11, 18];
/// Anonymous structs nested deeper than this are not looked into.
const MAX_DEPTH: u32 = 8;

/// Parsed type information.
pub(crate) struct Btf<'a> {
    /// Type section from each type's header on; type 0 is void.
    types: Vec<&'a [u8]>,
    strings: &'a [u8],
}

/// Header of a type.
struct Type<'a> {
    name: &'a str,
    kind: u32,
    /// Number of members.
    count: usize,
    /// Further bit of the kind: bit field sizes are in the members.
    flag: bool,
    /// Size, or the type that is pointed to.
    reference: u32,
    /// What follows the header.
    rest: &'a [u8],
}

impl<'a> Btf<'a> {
    /// Splits the sections into types; `None` where the format is another.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        if u16::from_ne_bytes([*bytes.first()?, *bytes.get(1)?]) != MAGIC {
            return None;
        }
        let header = word(bytes, 4)? as usize;
        let section = |at: usize| {
            let start = header.checked_add(word(bytes, at)? as usize)?;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        let (mut rest, strings) = (section(8)?, section(16)?);
        let mut types = vec![&bytes[..0]];
        while !rest.is_empty() {
            types.push(rest);
            rest = rest.get(12 + payload(word(rest, 4)?)?..)?;
        }
        Some(Self { types, strings })
    }

    fn name(&self, offset: u32) -> Option<&'a str> {
        let bytes = self.strings.get(offset as usize..)?;
        std::str::from_utf8(bytes.split(|byte| *byte == 0).next()?).ok()
    }

    fn get(&self, id: u32) -> Option<Type<'a>> {
        let bytes = *self.types.get(id as usize).filter(|bytes| !bytes.is_empty())?;
        let info = word(bytes, 4)?;
        Some(Type {
            name: self.name(word(bytes, 0)?)?,
            kind: (info >> 24) & 0x1f,
            count: (info & 0xffff) as usize,
            flag: info >> 31 == 1,
            reference: word(bytes, 8)?,
            rest: bytes.get(12..)?,
        })
    }

    fn find(&self, kind: u32, name: &str) -> Option<Type<'a>> {
        (1..self.types.len() as u32)
            .filter_map(|id| self.get(id))
            .find(|found| found.kind == kind && found.name == name)
    }

    /// Byte offset of a member by its path, such as `["__sk_common", "skc_net"]` in `sock`.
    pub(crate) fn offset(&self, structure: &str, path: &[&str]) -> Option<u32> {
        let mut current = self.find(KIND_STRUCT, structure)?;
        let mut offset = 0;
        for (depth, name) in path.iter().enumerate() {
            let (at, id) = self.member(&current, name, MAX_DEPTH)?;
            offset += at;
            if depth + 1 < path.len() {
                current = self.resolve(id)?;
            }
        }
        Some(offset)
    }

    /// Offset and type of a member, also inside anonymous structs and unions.
    fn member(&self, parent: &Type<'a>, name: &str, depth: u32) -> Option<(u32, u32)> {
        if depth == 0 || !matches!(parent.kind, KIND_STRUCT | KIND_UNION) {
            return None;
        }
        for index in 0..parent.count {
            let at = index * 12;
            let id = word(parent.rest, at + 4)?;
            let bits = word(parent.rest, at + 8)?;
            let offset = if parent.flag { bits & 0x00ff_ffff } else { bits } / 8;
            match self.name(word(parent.rest, at)?)? {
                found if found == name => return Some((offset, id)),
                "" => {
                    let nested = self.resolve(id)?;
                    if let Some((inner, id)) = self.member(&nested, name, depth - 1) {
                        return Some((offset + inner, id));
                    }
                }
                _ => {}
            }
        }
        None
    }

    fn resolve(&self, mut id: u32) -> Option<Type<'a>> {
        for _ in 0..MAX_DEPTH {
            let found = self.get(id)?;
            if !MODIFIERS.contains(&found.kind) {
                return Some(found);
            }
            id = found.reference;
        }
        None
    }

    /// Values and names of an enum.
    pub(crate) fn values(&self, name: &str) -> Option<Vec<(u32, &'a str)>> {
        let found = self.find(KIND_ENUM, name)?;
        (0..found.count)
            .map(|index| {
                Some((
                    word(found.rest, index * 8 + 4)?,
                    self.name(word(found.rest, index * 8)?)?,
                ))
            })
            .collect()
    }
}

/// Bytes behind the header of a type.
fn payload(info: u32) -> Option<usize> {
    let count = (info & 0xffff) as usize;
    Some(match (info >> 24) & 0x1f {
        KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
        KIND_ARRAY => 12,
        KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => count * 12,
        KIND_ENUM | KIND_FUNC_PROTO => count * 8,
        2 | 7..=12 | 16 | 18 => 0,
        _ => return None,
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_of_this_machine() {
        let bytes = std::fs::read("/sys/kernel/btf/vmlinux").expect("the kernel has BTF");
        let btf = Btf::parse(&bytes).expect("BTF of a known format");
        // Two pointers come before the device in a packet since it exists.
        assert_eq!(btf.offset("sk_buff", &["dev"]), Some(16));
        assert_eq!(btf.offset("sk_buff", &["sk"]), Some(24));
        assert!(btf.offset("net", &["ns", "inum"]).is_some());
        assert!(btf.offset("sock", &["__sk_common", "skc_net"]).is_some());
        assert!(btf.offset("net_device", &["nd_net"]).is_some());
        assert_eq!(btf.offset("sk_buff", &["no such member"]), None);
        assert_eq!(btf.offset("no such struct", &["dev"]), None);
        let reasons = btf
            .values("skb_drop_reason")
            .expect("the kernel names its drop reasons");
        assert!(
            reasons
                .iter()
                .any(|(_, name)| *name == "SKB_DROP_REASON_TC_EGRESS")
        );
    }

    #[test]
    fn garbage_is_refused() {
        assert!(Btf::parse(&[]).is_none());
        assert!(Btf::parse(&[0x9f, 0xeb]).is_none());
        assert!(Btf::parse(&[0xff; 64]).is_none());
        let mut header = [0_u8; 24];
        header[..2].copy_from_slice(&MAGIC.to_ne_bytes());
        header[4..8].copy_from_slice(&24_u32.to_ne_bytes());
        header[12..16].copy_from_slice(&400_u32.to_ne_bytes());
        assert!(Btf::parse(&header).is_none(), "a section beyond the end");
    }
}

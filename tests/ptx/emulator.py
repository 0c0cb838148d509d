"""Execute Triton's PTX on a CPU, with numpy over all threads of a block.

Implements the PTX ISA for the subset that occurs in these kernels. In addition to values it checks
that every global access is aligned and inside a tensor that was passed (exact bounds), and that no
two threads touch the same byte without a barrier in between, unless both read or write the same.
cp.async runs at the latest moment that its waits allow. Shared memory starts as garbage.
"""

from __future__ import annotations

import ctypes
import re

import numpy as np

np.seterr(all="ignore")
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
UINT = {8: U8, 16: U16, 32: U32, 64: U64}
SINT = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {32: np.float32, 64: np.float64, 16: np.float16}
SMEM_BASE = 1024
NAN32 = U32(0x7FFFFFFF)


class Fault(Exception):
    pass


# ---------------------------------------------------------------- memory


class Region:
    def __init__(self, base, size, name):
        self.base, self.size, self.name = base, size, name
        self.low = base & ~15
        high = (base + size + 15) & ~15
        n = high - self.low
        # The window is rounded to 16 bytes only so that it can be viewed in every width.
        self.bytes = np.frombuffer((ctypes.c_uint8 * n).from_address(self.low), dtype=U8)
        self.views = {w: self.bytes.view(UINT[8 * w]) for w in (1, 2, 4, 8)}
        self.shadow = None


class Shadow:
    """Which thread touched each byte since the last barrier."""

    def __init__(self, n):
        self.wt = np.full(n, -1, np.int32)  # thread that wrote
        self.we = np.full(n, -1, np.int32)  # in which epoch
        self.wv = np.zeros(n, np.uint8)
        self.rt = np.full(n, -1, np.int32)  # thread that read, -2: several
        self.re = np.full(n, -1, np.int32)
        self.wb = np.full(n, -1, np.int32)  # block that wrote (global only)
        self.rb = np.full(n, -1, np.int32)
        self.init = np.zeros(n, bool)


class Memory:
    def __init__(self, regions):
        merged = []
        for base, size, name in sorted(regions):
            if merged and base < merged[-1][0] + merged[-1][1]:
                b, s, n = merged[-1]
                merged[-1] = (b, max(s, base + size - b), n + "|" + name)
            elif size:
                merged.append((base, size, name))
        self.regions = [Region(*r) for r in merged]
        self.bases = np.array([r.base for r in self.regions], dtype=np.int64)
        self.ends = np.array([r.base + r.size for r in self.regions], dtype=np.int64)

    def locate(self, address, width, what):
        """Return [(region, positions within address, byte offset in window)]."""
        a = address.astype(np.int64)
        if len(a) == 0:
            return []
        if (a % width).any():
            raise Fault(
                f"misaligned {what}: address {hex(int(a[(a % width) != 0][0]))}, {width} bytes"
            )
        i = np.searchsorted(self.bases, a, "right") - 1
        bad = (i < 0) | (a + width > self.ends[np.maximum(i, 0)])
        if bad.any():
            first = int(a[bad][0])
            j = max(int(i[bad][0]), 0)
            r = self.regions[j]
            raise Fault(
                f"out of bounds {what}: {int(bad.sum())} threads, {hex(first)}, {width} bytes; "
                f"nearest region {r.name} [{hex(r.base)}, +{r.size}), offset {first - r.base}"
            )
        k = i[0]
        if (i == k).all():
            r = self.regions[k]
            return [(r, slice(None), a - r.low)]
        out = []
        for k in np.unique(i):
            sel = np.nonzero(i == k)[0]
            r = self.regions[k]
            out.append((r, sel, a[sel] - r.low))
        return out


# ---------------------------------------------------------------- float helpers


def half_to_float(bits):
    return bits.view(np.float16).astype(np.float32)


def bfloat_to_float(bits):
    return (bits.astype(U32) << U32(16)).view(np.float32)


TO_FLOAT = {"f16": half_to_float, "bf16": bfloat_to_float}


def canon32(x):
    """Return the bits of a float32 array, with the NaN that the hardware writes."""
    bits = x.view(U32)
    nan = x != x
    if nan.any():
        bits = np.where(nan, NAN32, bits)
    return bits


def ftz_in(x):
    b = x.view(U32)
    sub = ((b & U32(0x7F800000)) == 0) & ((b & U32(0x007FFFFF)) != 0)
    if sub.any():
        return np.where(sub, b & U32(0x80000000), b).astype(U32).view(np.float32)
    return x


def fma32(a, b, c):
    """Exact: the product of two float32 is exact in float64, and narrowing rounds to odd first."""
    p = a.astype(np.float64) * b.astype(np.float64)
    c = c.astype(np.float64)
    s = p + c
    bb = s - p
    err = (p - (s - bb)) + (c - bb)
    bits = s.view(np.int64).copy()
    inexact = (err != 0) & np.isfinite(s) & ((bits & 1) == 0)
    # move toward the true value: s and err of one sign: magnitude grows (truncation was down)
    up = (err > 0) == (s > 0)
    bits = np.where(inexact, np.where(up, bits + 1, bits - 1), bits)
    return bits.view(np.float64).astype(np.float32)


def fmax32(a, b, sign):
    """PTX min/max: NaN loses, -0 < +0; both NaN: canonical."""
    an, bn = a != a, b != b
    ab, bb = a.view(np.int32), b.view(np.int32)
    ka = np.where(ab < 0, ab ^ np.int32(0x7FFFFFFF), ab)
    kb = np.where(bb < 0, bb ^ np.int32(0x7FFFFFFF), bb)
    pick_a = (ka >= kb) if sign > 0 else (ka <= kb)
    r = np.where(pick_a, a.view(U32), b.view(U32))
    if an.any() or bn.any():
        r = np.where(an, b.view(U32), r)
        r = np.where(bn, a.view(U32), r)
        r = np.where(an & bn, NAN32, r)
    return r.astype(U32)


def bf16_of(x):
    b = x.view(U32)
    r = (b + U32(0x7FFF) + ((b >> U32(16)) & U32(1))) >> U32(16)
    r = np.where(x != x, U32(0x7FFF), r)
    return r.astype(U16)


# ---------------------------------------------------------------- parsing


class Instr:
    __slots__ = ("args", "kind", "line", "neg", "op", "pred", "run", "target", "text")


REG = re.compile(r"^%(rd|rs|r|p|f|fd)(\d+)$")
WIDTH = {"rd": 64, "rs": 16, "r": 32, "p": 1, "f": 32, "fd": 64}


def split_args(text):
    out, depth, cur = [], 0, ""
    for ch in text:
        if ch in "{[(":
            depth += 1
        elif ch in "}])":
            depth -= 1
        if ch == "," and depth == 0:
            out.append(cur.strip())
            cur = ""
        else:
            cur += ch
    if cur.strip():
        out.append(cur.strip())
    return out


def parse(ptx):
    """Instructions, labels, parameters, block size."""
    text = re.sub(r"//[^\n]*", "", ptx)
    m = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.\w+[^{\n]*\n?)*)\{", text, re.S)
    name, params_text, directives = m.group(1), m.group(2), m.group(3)
    params = []
    for p in params_text.split(","):
        p = p.strip()
        if p:
            mm = re.match(r"\.param\s+\.(\w+)\s.*?([\w$]+)$", p.replace("\n", " "))
            params.append((mm.group(2), mm.group(1)))
    n_threads = int(re.search(r"\.reqntid\s+(\d+)", directives).group(1))
    # body: up to the closing brace of the entry at depth 0
    start = m.end()
    depth, i = 1, start
    while depth:
        if text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
        i += 1
    body = text[start : i - 1]
    instrs, labels = [], {}
    statements, cur, depth = [], "", 0
    for ch in body:
        cur += ch
        if ch == ";":
            statements.append(cur)
            cur = ""
    if cur.strip():
        statements.append(cur)
    for s in statements:
        lines = [line.strip() for line in s.split("\n")]
        lines = [
            line
            for line in lines
            if line and not line.startswith((".loc", ".reg", ".file", ".pragma", ".section"))
        ]
        s = " ".join(lines).strip()
        while True:
            mm = re.match(r"^(\$[\w$]+):\s*", s)
            if not mm:
                break
            labels[mm.group(1)] = len(instrs)
            s = s[mm.end() :]
        s = s.rstrip(";").strip()
        # scoping braces of inline assembly
        while s.startswith("{") or (s.startswith("}")):
            s = s[1:].strip()
            s = re.sub(r"^\.reg[^;]*;?", "", s).strip()
        if not s or s.startswith("."):
            continue
        ins = Instr()
        ins.pred, ins.neg = None, False
        mm = re.match(r"^@(!?)(%\w+)\s+", s)
        if mm:
            ins.neg, ins.pred = bool(mm.group(1)), mm.group(2)
            s = s[mm.end() :]
        mm = re.match(r"^([a-z][\w.:]*)\s*(.*)$", s, re.S)
        if not mm:
            raise Fault(f"cannot parse {s!r}")
        ins.op, ins.args, ins.text = mm.group(1), split_args(mm.group(2)), s
        ins.line = len(instrs)
        instrs.append(ins)
    return name, params, n_threads, instrs, labels


def immediate(text, bits, is_float):
    if text.startswith("0f"):
        return (
            UINT[bits](int(text[2:], 16))
            if bits == 32
            else U64(
                np.array([int(text[2:], 16)], U32).view(np.float32).astype(np.float64).view(U64)[0]
            )
        )
    if text.startswith("0d"):
        return U64(int(text[2:], 16))
    v = int(text.rstrip("U"), 0)
    return UINT[bits](v & ((1 << bits) - 1))


class Kernel:
    def __init__(self, ptx, shared_bytes):
        self.name, self.params, self.T, self.instrs, self.labels = parse(ptx)
        self.shared_bytes = shared_bytes
        self.W = (self.T + 31) // 32
        self.tid = np.arange(self.T, dtype=U32)
        self.warp = (self.tid >> 5).astype(np.int32)
        self.compiled = [self.compile(i) for i in self.instrs]

    # ---- operands: functions of the machine state

    def reader(self, text, bits, kind="u"):
        """Return a reader of the operand as uint array (or scalar) of `bits`; `kind` f, s or u."""
        dtype = {"u": UINT, "s": SINT, "f": FLOAT}[kind].get(bits) if bits != 1 else bool
        m = REG.match(text)
        T = self.T
        if m:
            w = WIDTH[m.group(1)]
            if bits == 1 or w == 1:
                return lambda S: S.R[text]
            if w == bits:
                if kind == "u":
                    return lambda S: S.R[text]
                return lambda S: S.R[text].view(dtype)
            if w > bits:
                return lambda S: S.R[text].astype(UINT[bits]).view(dtype)
            # a wider type read from a narrower register: allowed for cvt only
            raise Fault(f"operand {text} too narrow for {bits}")
        if text.startswith("%"):
            return self.special(text, dtype)
        if text == "global_smem" or text.startswith("global_smem"):
            off = 0
            if "+" in text:
                off = int(text.split("+")[1])
            a = np.full(T, SMEM_BASE + off, dtype=UINT[bits])
            return lambda S: a
        if bits == 1:
            v = np.full(T, int(text, 0) != 0)
            return lambda S: v
        a = np.full(T, immediate(text, bits, kind == "f"), dtype=UINT[bits]).view(dtype)
        return lambda S: a

    def special(self, text, dtype):
        T = self.T
        if text == "%tid.x":
            a = self.tid.astype(dtype)
            return lambda S: a
        if text in ("%tid.y", "%tid.z"):
            a = np.zeros(T, dtype)
            return lambda S: a
        if text == "%laneid":
            a = (self.tid & U32(31)).astype(dtype)
            return lambda S: a
        if text.startswith("%ctaid."):
            k = "xyz".index(text[-1])
            return lambda S: np.full(T, S.ctaid[k], dtype)
        if text.startswith("%nctaid."):
            k = "xyz".index(text[-1])
            return lambda S: np.full(T, S.nctaid[k], dtype)
        if text == "%ntid.x":
            return lambda S: np.full(T, T, dtype)
        raise Fault(f"special register {text}")

    def writer(self, text):
        """Return a function(S, mask or None, uint array) that stores into a register."""
        if text == "_":
            return lambda S, mask, v: None
        m = REG.match(text)
        w = WIDTH[m.group(1)]

        if w == 1:

            def put(S, mask, v):
                S.R[text] = v if mask is None else np.where(mask, v, S.R[text])

            return put
        dtype = UINT[w]

        def put(S, mask, v):
            if v.dtype != dtype:
                if v.dtype.itemsize == dtype().itemsize:
                    v = v.view(dtype)
                else:
                    raise Fault(f"width of {text}: {v.dtype}")
            S.R[text] = v if mask is None else np.where(mask, v, S.R[text])

        return put

    def address(self, text):
        m = re.match(r"^\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
        base, off = m.group(1), int(m.group(2) or "0", 0)
        return base, off

    # ---- compile one instruction

    def compile(self, ins):
        op = ins.op
        parts = op.split(".")
        handler = getattr(self, "op_" + parts[0].replace("::", "_"), None)
        if handler is None:
            raise Fault(f"no handler for {op}: {ins.text}")
        return handler(ins, parts)

    def simple(self, ins, f, dst, srcs):
        """D = f(*srcs) for typed readers."""
        put = self.writer(dst)

        def run(S, mask):
            put(S, mask, f(*[s(S) for s in srcs]))

        return run

    @staticmethod
    def ty(part):
        kind, bits = part[0], part[1:]
        return kind, int(bits)

    def op_mov(self, ins, parts):
        d, s = ins.args
        if parts[1] == "pred":
            return self.simple(ins, lambda a: np.array(a, copy=True), d, [self.reader(s, 1)])
        bits = int(parts[1][1:])
        if d.startswith("{"):
            ds = [x.strip() for x in d.strip("{}").split(",")]
            w = bits // len(ds)
            puts = [self.writer(x) for x in ds]
            r = self.reader(s, bits)

            def run(S, mask):
                v = r(S)
                for i, p in enumerate(puts):
                    p(S, mask, (v >> UINT[bits](i * w)).astype(UINT[w]))

            return run
        if s.startswith("{"):
            ss = [x.strip() for x in s.strip("{}").split(",")]
            w = bits // len(ss)
            rs = [self.reader(x, w) for x in ss]

            def f(*xs):
                v = xs[0].astype(UINT[bits])
                for i, x in enumerate(xs[1:], 1):
                    v = v | (x.astype(UINT[bits]) << UINT[bits](i * w))
                return v

            return self.simple(ins, f, d, rs)
        return self.simple(ins, lambda a: a, d, [self.reader(s, bits)])

    def arith(self, ins, parts, f_int, f_float):
        d = ins.args[0]
        if parts[-1] in ("s16x2", "u16x2"):
            rs = [self.reader(a, 32) for a in ins.args[1:]]

            def f(*xs):
                lanes = [x.view(U16) for x in xs]
                return f_int(*lanes).view(U32)

            return self.simple(ins, f, d, rs)
        if "ftz" in parts or "sat" in parts:
            raise Fault(ins.text)
        if parts[-2:] in (["f32", "f16"], ["f32", "bf16"]):  # the first operand has 16 bits
            narrow, wide = self.reader(ins.args[1], 16), self.reader(ins.args[2], 32, "f")
            to_float = TO_FLOAT[parts[-1]]
            return self.simple(
                ins, lambda a, b: canon32(f_float(to_float(a), b)), d, [narrow, wide]
            )
        if parts[-1] == "f32x2":
            rs = [self.reader(a, 64) for a in ins.args[1:]]

            def f(*xs):
                lanes = [np.ascontiguousarray(x).view(np.float32) for x in xs]
                return canon32(f_float(*lanes)).view(U64)

            return self.simple(ins, f, d, rs)
        kind, bits = self.ty(parts[-1])
        if kind == "f":
            rs = [self.reader(a, bits, "f") for a in ins.args[1:]]
            if bits == 32:
                return self.simple(ins, lambda *xs: canon32(f_float(*xs)), d, rs)
            return self.simple(ins, lambda *xs: f_float(*xs).view(U64), d, rs)
        rs = [self.reader(a, bits) for a in ins.args[1:]]
        return self.simple(ins, f_int, d, rs)

    def op_add(self, ins, parts):
        return self.arith(ins, parts, lambda a, b: a + b, lambda a, b: a + b)

    def op_sub(self, ins, parts):
        return self.arith(ins, parts, lambda a, b: a - b, lambda a, b: a - b)

    def op_neg(self, ins, parts):
        kind, bits = self.ty(parts[-1])
        if kind == "f":
            r = self.reader(ins.args[1], bits)
            return self.simple(ins, lambda a: a ^ UINT[bits](1 << (bits - 1)), ins.args[0], [r])
        r = self.reader(ins.args[1], bits)
        return self.simple(ins, lambda a: (~a) + UINT[bits](1), ins.args[0], [r])

    def op_abs(self, ins, parts):
        if parts[-1] in ("bf16x2", "f16x2"):
            r = self.reader(ins.args[1], 32)
            return self.simple(ins, lambda a: a & U32(0x7FFF7FFF), ins.args[0], [r])
        kind, bits = self.ty(parts[-1])
        if kind == "f":
            r = self.reader(ins.args[1], bits)
            return self.simple(
                ins, lambda a: a & UINT[bits]((1 << (bits - 1)) - 1), ins.args[0], [r]
            )
        r = self.reader(ins.args[1], bits, "s")
        return self.simple(ins, lambda a: np.abs(a).view(UINT[bits]), ins.args[0], [r])

    def op_mul(self, ins, parts):
        if parts[-1][0] == "f":
            return self.arith(ins, parts, None, lambda a, b: a * b)
        kind, bits = self.ty(parts[-1])
        d = ins.args[0]
        mode = parts[1]
        k = "s" if kind == "s" else "u"
        rs = [self.reader(a, bits, k) for a in ins.args[1:]]
        if mode == "lo":
            rs = [self.reader(a, bits) for a in ins.args[1:]]
            return self.simple(ins, lambda a, b: a * b, d, rs)
        wide = (SINT if k == "s" else UINT)[min(64, 2 * bits)]
        if mode == "wide":
            return self.simple(
                ins, lambda a, b: (a.astype(wide) * b.astype(wide)).view(UINT[2 * bits]), d, rs
            )
        if mode == "hi" and bits < 64:
            return self.simple(
                ins,
                lambda a, b: ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(UINT[bits]),
                d,
                rs,
            )
        if mode == "hi":

            def f(a, b):
                x = [int(p) * int(q) >> 64 for p, q in zip(a.tolist(), b.tolist(), strict=True)]
                return np.array([v & (2**64 - 1) for v in x], U64)

            return self.simple(ins, f, d, rs)
        raise Fault(ins.text)

    def op_mad(self, ins, parts):
        kind, bits = self.ty(parts[-1])
        d, a, b, c = ins.args
        if kind == "f":
            raise Fault(ins.text)
        mode = parts[1]
        if mode == "lo":
            rs = [self.reader(x, bits) for x in (a, b, c)]
            return self.simple(ins, lambda a, b, c: a * b + c, d, rs)
        if mode == "wide":
            k = "s" if kind == "s" else "u"
            wide = (SINT if k == "s" else UINT)[2 * bits]
            rs = [self.reader(a, bits, k), self.reader(b, bits, k), self.reader(c, 2 * bits)]
            return self.simple(
                ins,
                lambda a, b, c: (a.astype(wide) * b.astype(wide)).view(UINT[2 * bits]) + c,
                d,
                rs,
            )
        raise Fault(ins.text)

    def op_fma(self, ins, parts):
        if parts[-1] not in ("f32", "f32x2"):
            raise Fault(ins.text)
        return self.arith(ins, parts, None, fma32)

    def op_div(self, ins, parts):
        kind, bits = self.ty(parts[-1])
        d, a, b = ins.args
        if kind == "f":
            if parts[1] != "rn" or "ftz" in parts:
                raise Fault(ins.text)
            rs = [self.reader(x, bits, "f") for x in (a, b)]
            return self.simple(ins, lambda a, b: canon32(a / b), d, rs)
        rs = [self.reader(x, bits, kind) for x in (a, b)]

        def f(a, b):
            a, b = a.astype(np.int64), b.astype(np.int64)
            bb = np.where(b == 0, 1, b)
            q = np.abs(a) // np.abs(bb)
            return np.where((a < 0) != (bb < 0), -q, q).astype(SINT[bits]).view(UINT[bits])

        return self.simple(ins, f, d, rs)

    def op_rem(self, ins, parts):
        kind, bits = self.ty(parts[-1])
        d, a, b = ins.args
        rs = [self.reader(x, bits, kind) for x in (a, b)]

        def f(a, b):
            a, b = a.astype(np.int64), b.astype(np.int64)
            bb = np.where(b == 0, 1, b)
            r = np.abs(a) % np.abs(bb)
            return np.where(a < 0, -r, r).astype(SINT[bits]).view(UINT[bits])

        return self.simple(ins, f, d, rs)

    def op_sqrt(self, ins, parts):
        ftz = "ftz" in parts
        r = self.reader(ins.args[1], 32, "f")
        put = self.writer(ins.args[0])

        def run(S, mask):
            x = r(S)
            if ftz:
                x = ftz_in(x)
            y = canon32(np.sqrt(x))
            put(S, mask, y)

        return run

    def minmax(self, ins, parts, sign):
        kind, bits = self.ty(parts[-1])
        if kind == "f":
            if parts[1] not in ("f32",):
                raise Fault(ins.text)
            rs = [self.reader(x, 32, "f") for x in ins.args[1:]]

            def of_all(first, *others):  # two or three
                for other in others:
                    first = fmax32(first.view(np.float32), other, sign)
                return first

            return self.simple(ins, of_all, ins.args[0], rs)
        rs = [self.reader(x, bits, kind) for x in ins.args[1:]]
        f = np.maximum if sign > 0 else np.minimum
        return self.simple(ins, lambda a, b: f(a, b).view(UINT[bits]), ins.args[0], rs)

    def op_max(self, ins, parts):
        return self.minmax(ins, parts, 1)

    def op_min(self, ins, parts):
        return self.minmax(ins, parts, -1)

    def bitop(self, ins, parts, f):
        bits = 1 if parts[-1] == "pred" else int(parts[-1][1:])
        return self.simple(ins, f, ins.args[0], [self.reader(x, bits) for x in ins.args[1:]])

    def op_and(self, ins, parts):
        return self.bitop(ins, parts, lambda a, b: a & b)

    def op_or(self, ins, parts):
        return self.bitop(ins, parts, lambda a, b: a | b)

    def op_xor(self, ins, parts):
        return self.bitop(ins, parts, lambda a, b: a ^ b)

    def op_popc(self, ins, parts):
        def f(a):
            return np.unpackbits(a.view(U8).reshape(len(a), -1), axis=1).sum(axis=1).astype(U32)

        return self.simple(ins, f, ins.args[0], [self.reader(ins.args[1], self.ty(parts[-1])[1])])

    def op_not(self, ins, parts):
        return self.bitop(ins, parts, lambda a: ~a)

    def op_lop3(self, ins, parts):
        rs = [self.reader(x, 32) for x in ins.args[1:4]]
        table = int(ins.args[4], 0)

        def f(a, b, c):
            r = np.zeros_like(a)
            for i in range(8):
                if table >> i & 1:
                    r |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
            return r

        return self.simple(ins, f, ins.args[0], rs)

    def op_shl(self, ins, parts):
        bits = int(parts[-1][1:])
        rs = [self.reader(ins.args[1], bits), self.reader(ins.args[2], 32)]

        def f(a, n):
            n = np.minimum(n, U32(bits))
            return np.where(
                n >= bits, UINT[bits](0), a << np.minimum(n, U32(bits - 1)).astype(UINT[bits])
            ).astype(UINT[bits])

        return self.simple(ins, f, ins.args[0], rs)

    def op_shr(self, ins, parts):
        kind, bits = self.ty(parts[-1])
        kind = "s" if kind == "s" else "u"
        dt = (SINT if kind == "s" else UINT)[bits]
        rs = [self.reader(ins.args[1], bits, kind), self.reader(ins.args[2], 32)]

        def f(a, n):
            m = np.minimum(n, U32(bits - 1)).astype(dt)
            r = a >> m
            if kind == "u":
                r = np.where(n >= bits, dt(0), r).astype(dt)
            return r.view(UINT[bits])

        return self.simple(ins, f, ins.args[0], rs)

    def op_bfe(self, ins, parts):
        kind, bits = self.ty(parts[-1])
        if bits == 64 and kind == "u":
            rs = [self.reader(ins.args[1], 64)] + [self.reader(x, 32) for x in ins.args[2:]]

            def f64(a, pos, n):
                p = np.minimum(pos & U32(255), 63).astype(U64)
                n = np.minimum(n & U32(255), 63).astype(U64)
                return (a >> p) & ((U64(1) << n) - U64(1))

            return self.simple(ins, f64, ins.args[0], rs)
        if bits != 32:
            raise Fault(ins.text)
        rs = [self.reader(ins.args[1], 32)] + [self.reader(x, 32) for x in ins.args[2:]]

        def f(a, pos, n):
            pos, n = pos & U32(255), n & U32(255)
            wide = a.astype(np.int64) if kind == "u" else a.view(np.int32).astype(np.int64)
            p = np.minimum(pos, 63).astype(np.int64)
            ln = np.minimum(n, 32).astype(np.int64)
            v = wide >> p
            m = (np.int64(1) << ln) - 1
            low = v & m
            if kind == "u":
                return low.astype(U32)
            # sign bit: bit min(pos+len-1, 31)
            sb = np.minimum(pos.astype(np.int64) + ln - 1, 31)
            sign = (wide >> sb) & 1
            r = np.where((ln > 0) & (sign == 1), low | ~m, low)
            r = np.where(ln == 0, 0, r)
            return r.astype(np.int64).astype(np.int32).view(U32)

        return self.simple(ins, f, ins.args[0], rs)

    def op_bfi(self, ins, parts):
        rs = [self.reader(x, 32) for x in ins.args[1:]]

        def f(a, b, pos, n):
            m = (
                ((U64(1) << np.minimum(n & U32(255), 32).astype(U64)) - U64(1))
                << np.minimum(pos & U32(255), 63).astype(U64)
            ).astype(U32)
            sh = (a.astype(U64) << np.minimum(pos & U32(255), 63).astype(U64)).astype(U32)
            return (b & ~m) | (sh & m)

        return self.simple(ins, f, ins.args[0], rs)

    def op_shf(self, ins, parts):
        rs = [self.reader(x, 32) for x in ins.args[1:]]
        left, wrap = parts[1] == "l", parts[2] == "wrap"

        def f(a, b, c):
            n = (c & U32(31)) if wrap else np.minimum(c, U32(32))
            v = (b.astype(U64) << U64(32)) | a.astype(U64)
            if left:
                return ((v << n.astype(U64)) >> U64(32)).astype(U32)
            return (v >> n.astype(U64)).astype(U32)

        return self.simple(ins, f, ins.args[0], rs)

    def op_prmt(self, ins, parts):
        if len(parts) > 2:
            raise Fault(ins.text)
        rs = [self.reader(x, 32) for x in ins.args[1:]]

        def f(a, b, c):
            v = (b.astype(U64) << U64(32)) | a.astype(U64)
            r = np.zeros_like(a)
            for i in range(4):
                sel = (c >> U32(4 * i)) & U32(15)
                byte = (v >> ((sel & U32(7)).astype(U64) * U64(8))).astype(U32) & U32(0xFF)
                byte = np.where(sel & U32(8), np.where(byte & U32(0x80), U32(0xFF), U32(0)), byte)
                r |= byte << U32(8 * i)
            return r.astype(U32)

        # constant selectors are the common case: much faster
        try:
            c = int(ins.args[3].rstrip("U"), 0)
        except ValueError:
            return self.simple(ins, f, ins.args[0], rs)
        sels = [(c >> (4 * i)) & 15 for i in range(4)]

        def g(a, b):
            a4 = np.ascontiguousarray(a).view(U8).reshape(-1, 4)
            b4 = np.ascontiguousarray(b).view(U8).reshape(-1, 4)
            out = np.empty((self.T, 4), U8)
            for i, sel in enumerate(sels):
                src = (a4 if (sel & 7) < 4 else b4)[:, sel & 3]
                out[:, i] = np.where(src & 0x80, 0xFF, 0) if sel & 8 else src
            return out.view(U32).reshape(-1)

        return self.simple(ins, g, ins.args[0], rs[:2])

    def op_selp(self, ins, parts):
        bits = int(parts[-1][1:])
        rs = [self.reader(x, bits) for x in ins.args[1:3]] + [self.reader(ins.args[3], 1)]
        return self.simple(ins, lambda a, b, p: np.where(p, a, b), ins.args[0], rs)

    def op_setp(self, ins, parts):
        cmp = parts[1]
        kind, bits = self.ty(parts[-1])
        if len(parts) > 3:
            raise Fault(ins.text)
        k = {"b": "u", "u": "u", "s": "s", "f": "f"}[kind]
        rs = [self.reader(x, bits, k) for x in ins.args[1:]]
        fs = {
            "eq": lambda a, b: a == b,
            "ne": lambda a, b: (a != b) & (a == a) & (b == b) if k == "f" else a != b,
            "lt": lambda a, b: a < b,
            "le": lambda a, b: a <= b,
            "gt": lambda a, b: a > b,
            "ge": lambda a, b: a >= b,
            "equ": lambda a, b: (a == b) | (a != a) | (b != b),
            "neu": lambda a, b: a != b,
            "ltu": lambda a, b: ~(a >= b),
            "leu": lambda a, b: ~(a > b),
            "gtu": lambda a, b: ~(a <= b),
            "geu": lambda a, b: ~(a < b),
            "num": lambda a, b: (a == a) & (b == b),
            "nan": lambda a, b: (a != a) | (b != b),
        }
        if "|" in ins.args[0]:
            raise Fault(ins.text)
        return self.simple(ins, fs[cmp], ins.args[0], rs)

    def op_cvt(self, ins, parts):
        d, s = ins.args[0], ins.args[1:]
        mods, dt, st = parts[1:-2], parts[-2], parts[-1]
        rw = WIDTH[REG.match(d).group(1)]
        if dt == "bf16x2" and st == "f32" and mods == ["rn"]:
            rs = [self.reader(x, 32, "f") for x in s]
            return self.simple(
                ins, lambda a, b: (bf16_of(a).astype(U32) << U32(16)) | bf16_of(b), d, rs
            )
        if dt == "f16x2" and st == "f32" and mods == ["rn"]:
            rs = [self.reader(x, 32, "f") for x in s]
            return self.simple(
                ins, lambda a, b: (f16_of(a).astype(U32) << U32(16)) | f16_of(b), d, rs
            )
        s = s[0]
        if dt == "bf16" and st == "f32" and mods == ["rn"]:
            return self.simple(ins, bf16_of, d, [self.reader(s, 32, "f")])
        if dt == "f16" and st == "f32" and mods == ["rn"]:
            return self.simple(ins, f16_of, d, [self.reader(s, 32, "f")])
        if dt == "f32" and st == "bf16" and not mods:
            return self.simple(
                ins,
                lambda a: canon32(bfloat_to_float(a)),
                d,
                [self.reader(s, 16)],
            )
        if dt == "f32" and st == "f16" and not mods:
            return self.simple(
                ins,
                lambda a: canon32(half_to_float(a)),
                d,
                [self.reader(s, 16)],
            )
        if dt == "f32" and st == "f32":
            r = self.reader(s, 32, "f")
            f = {"rmi": np.floor, "rpi": np.ceil, "rni": np.rint, "rzi": np.trunc}[mods[0]]
            ftz = "ftz" in mods
            if set(mods) - {mods[0], "ftz"}:
                raise Fault(ins.text)
            return self.simple(ins, lambda a: canon32(f(ftz_in(a) if ftz else a)), d, [r])
        sk, sb = self.ty(st)
        dk, db = self.ty(dt)
        if sk == "f":
            if dk in "su" and sb == 32 and db == 32 and mods[0] in ("rzi", "rni", "rmi"):
                f = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor}[mods[0]]
                lo, hi = (-(2**31), 2**31 - 1) if dk == "s" else (0, 2**32 - 1)

                def conv(a):
                    a = ftz_in(a) if "ftz" in mods else a
                    v = f(a.astype(np.float64))
                    v = np.where(v != v, 0, np.clip(v, lo, hi))
                    return v.astype(np.int64).astype(U64).astype(U32)

                return self.simple(ins, conv, d, [self.reader(s, 32, "f")])
            if dt == "f64" and st == "f32":
                return self.simple(
                    ins, lambda a: a.astype(np.float64).view(U64), d, [self.reader(s, 32, "f")]
                )
            if dt == "f32" and st == "f64" and mods == ["rn"]:
                return self.simple(
                    ins, lambda a: canon32(a.astype(np.float32)), d, [self.reader(s, 64, "f")]
                )
            if dt == "s64" and st == "f64" and mods == ["rzi"]:

                def whole(a):
                    if not (np.abs(a) < 2.0**63).all():
                        raise Fault(ins.text)  # a GPU saturates; nothing here comes near
                    return a.astype(np.int64).view(U64)

                return self.simple(ins, whole, d, [self.reader(s, 64, "f")])
            raise Fault(ins.text)
        sw = WIDTH[REG.match(s).group(1)] if REG.match(s) else sb
        r0 = self.reader(s, sw)

        def source(S):
            v = r0(S)
            v = v.astype(UINT[sb]) if sw != sb else v
            return v.view(SINT[sb]) if sk == "s" else v

        if dk == "f":
            if mods != ["rn"]:
                raise Fault(ins.text)
            if db == 64:
                return self.simple(ins, lambda a: a.astype(np.float64).view(U64), d, [source])
            return self.simple(ins, lambda a: a.astype(np.float32).view(U32), d, [source])
        if mods:
            raise Fault(ins.text)

        def conv(a):
            v = a.astype((SINT if dk == "s" else UINT)[db])
            # to the register's width: sign for .s, zeros for .u
            return v.astype((SINT if dk == "s" else UINT)[rw]).view(UINT[rw])

        return self.simple(ins, conv, d, [source])

    # ---- memory

    def lanes(self, S, mask):
        return np.arange(self.T) if mask is None else np.nonzero(mask)[0]

    def op_ld(self, ins, parts):
        d, a = ins.args[0], ins.args[1]
        space = parts[1].split("::")[0]
        if space == "param":
            base, off = self.address(a)
            bits = int(parts[-1][1:])
            put = self.writer(d)
            w = WIDTH[REG.match(d).group(1)]
            table = SINT if parts[-1][0] == "s" else UINT  # to the register's width

            def run(S, mask):
                put(S, mask, S.param(base, bits).view(table[bits]).astype(table[w]).view(UINT[w]))

            return run
        bits = int(re.sub(r"\D", "", parts[-1]))
        ds = [x.strip() for x in d.strip("{} ").split(",")] if d.startswith("{") else [d]
        puts = [self.writer(x) for x in ds]
        signed_ = parts[-1][0] == "s"
        rws = [WIDTH[REG.match(x).group(1)] if x != "_" else bits for x in ds]
        base, off = self.address(a)
        vec, size = len(ds), bits // 8
        r = self.reader(base, 64 if base.startswith("%rd") else 32)

        def run(S, mask):
            lanes = self.lanes(S, mask)
            address = r(S)[lanes].astype(np.int64) + off
            values = S.load(space, address, size, vec, lanes, ins)
            for i, (p, w) in enumerate(zip(puts, rws, strict=True)):
                full = np.zeros(self.T, UINT[w])
                v = values[:, i]
                if signed_:
                    v = v.view(SINT[bits]).astype(SINT[w]).view(UINT[w])
                full[lanes] = v
                p(S, mask, full)

        return run

    def op_st(self, ins, parts):
        a, v = ins.args
        space = parts[1].split("::")[0]
        bits = int(re.sub(r"\D", "", parts[-1]))
        vs = [x.strip() for x in v.strip("{} ").split(",")] if v.startswith("{") else [v]
        rws = [WIDTH[REG.match(x).group(1)] if REG.match(x) else bits for x in vs]
        rs = [self.reader(x, w) for x, w in zip(vs, rws, strict=True)]
        base, off = self.address(a)
        size = bits // 8
        r = self.reader(base, 64 if base.startswith("%rd") else 32)

        def run(S, mask):
            lanes = self.lanes(S, mask)
            address = r(S)[lanes].astype(np.int64) + off
            values = np.stack([x(S)[lanes].astype(UINT[bits]) for x in rs], axis=1)
            S.store(space, address, size, values, lanes, ins)

        return run

    def op_atom(self, ins, parts):
        d, a, v = ins.args
        if parts[1] != "global" or parts[-2:] not in (["max", "s32"], ["add", "u32"]):
            raise Fault(ins.text)
        ufunc, view = (np.maximum, np.int32) if "max" in parts else (np.add, U32)
        base, off = self.address(a)
        r, rv, put = self.reader(base, 64), self.reader(v, 32), self.writer(d)

        def run(S, mask):
            lanes = self.lanes(S, mask)
            address = r(S)[lanes].astype(np.int64) + off
            old = S.load("global", address, 4, 1, lanes, ins, atomic=True)[:, 0]
            full = np.zeros(self.T, U32)
            full[lanes] = old
            for region, sel, o in S.memory.locate(address, 4, ins.text):
                ufunc.at(region.views[4].view(view), o // 4, rv(S)[lanes].view(view)[sel])
            put(S, mask, full)

        return run

    op_red = None

    # ---- warp

    def whole_warps(self, S, mask, ins):
        if mask is None:
            return
        m = mask.reshape(self.W, 32)
        if not (m.all(axis=1) | ~m.any(axis=1)).all():
            raise Fault(f"divergent warp at {ins.text}")

    def op_shfl(self, ins, parts):
        mode = parts[2]
        d, a, b, c = ins.args[:4]
        if "|" in d:
            d = d.split("|")[0]
        r, rb, rc = self.reader(a, 32), self.reader(b, 32), self.reader(c, 32)
        rm = self.reader(ins.args[4], 32)
        put = self.writer(d)
        lane = (self.tid & U32(31)).astype(np.int64)

        def run(S, mask):
            self.whole_warps(S, mask, ins)
            if (rm(S)[slice(None) if mask is None else mask] != U32(0xFFFFFFFF)).any():
                raise Fault("shfl of a part of a warp")
            bv, cv = rb(S).astype(np.int64) & 31, rc(S).astype(np.int64)
            seg, clamp = (cv >> 8) & 31, cv & 31
            lo = lane & seg
            hi = lo | (clamp & ~seg)
            if mode == "bfly":
                j = lane ^ bv
                ok = j <= hi
            elif mode == "idx":
                j = lo | (bv & ~seg)
                ok = j <= hi
            elif mode == "up":
                j = lane - bv
                ok = j >= hi
            else:
                j = lane + bv
                ok = j <= hi
            j = np.where(ok, j, lane)
            src = (self.tid.astype(np.int64) & ~31) + j
            put(S, mask, r(S)[src])

        return run

    def op_redux(self, ins, parts):
        kind = parts[-1]
        f = {
            "add": np.add,
            "max": np.maximum,
            "min": np.minimum,
            "or": np.bitwise_or,
            "and": np.bitwise_and,
        }[parts[2]]
        r = self.reader(ins.args[1], 32, "s" if kind == "s32" else "u")
        rm = self.reader(ins.args[2], 32)
        put = self.writer(ins.args[0])

        def run(S, mask):
            self.whole_warps(S, mask, ins)
            if (rm(S)[slice(None) if mask is None else mask] != U32(0xFFFFFFFF)).any():
                raise Fault("redux of a part of a warp")
            v = r(S).reshape(self.W, 32)
            x = f.reduce(v, axis=1, dtype=v.dtype)
            put(S, mask, np.repeat(x, 32).view(U32))

        return run

    def op_vote(self, ins, parts):
        raise Fault(ins.text)

    # ---- control

    def op_bra(self, ins, parts):
        ins.kind = "bra"
        ins.target = self.labels[ins.args[0]]
        return "bra"

    def op_ret(self, ins, parts):
        return "ret"

    def op_exit(self, ins, parts):
        return "ret"

    def op_bar(self, ins, parts):
        if parts[1] == "warp":

            def run(S, mask):
                self.whole_warps(S, mask, ins)
                S.warp_sync(mask)

            return run
        return "bar"

    op_barrier = op_bar

    def op_fence(self, ins, parts):
        return lambda S, mask: None

    def op_membar(self, ins, parts):
        return lambda S, mask: None

    # ---- asynchronous copies

    def op_cp(self, ins, parts):
        if parts[1] != "async":
            raise Fault(ins.text)
        if parts[2] == "commit_group":
            return lambda S, mask: S.cp_commit()
        if parts[2] == "wait_group":
            n = int(ins.args[0], 0)
            return lambda S, mask: S.cp_wait(n)
        dst, src, size = ins.args[0], ins.args[1], int(ins.args[2], 0)
        rd_base, rd_off = self.address(dst)
        rs_base, rs_off = self.address(src)
        rd, rs = self.reader(rd_base, 32), self.reader(rs_base, 64)
        rz = self.reader(ins.args[3], 32) if len(ins.args) > 3 else None

        def run(S, mask):
            lanes = self.lanes(S, mask)
            da = rd(S)[lanes].astype(np.int64) + rd_off
            sa = rs(S)[lanes].astype(np.int64) + rs_off
            n = rz(S)[lanes].astype(np.int64) if rz else np.full(len(lanes), size)
            S.cp_issue(da, sa, size, n, lanes, ins)

        return run

    # ---- matrices

    def op_ldmatrix(self, ins, parts):
        n = int(next(p for p in parts if re.match(r"x\d", p))[1:])
        trans = "trans" in parts
        if parts[-1] != "b16":
            raise Fault(ins.text)
        ds = [x.strip() for x in ins.args[0].strip("{} ").split(",")]
        puts = [self.writer(x) for x in ds]
        base, off = self.address(ins.args[1])
        r = self.reader(base, 32)

        def run(S, mask):
            self.whole_warps(S, mask, ins)
            lanes = self.lanes(S, mask)
            warps = len(lanes) // 32
            address = (r(S)[lanes].astype(np.int64) + off).reshape(warps, 32)
            for k in range(n):
                rows = address[:, 8 * k : 8 * k + 8]  # row addresses of matrix k
                if (rows % 16).any():
                    raise Fault("misaligned ldmatrix")
                a = rows[:, :, None] + np.arange(8)[None, None, :] * 2
                who = np.repeat(lanes.reshape(warps, 32)[:, 8 * k : 8 * k + 8, None], 8, axis=2)
                m = S.load("shared", a.reshape(-1), 2, 1, who.reshape(-1), ins)[:, 0].reshape(
                    warps, 8, 8
                )
                if trans:
                    m = m.transpose(0, 2, 1)
                lane = np.arange(32)
                lo = m[:, lane // 4, (lane % 4) * 2].astype(U32)
                hi = m[:, lane // 4, (lane % 4) * 2 + 1].astype(U32)
                full = np.zeros(self.T, U32)
                full[lanes] = (lo | (hi << U32(16))).reshape(-1)
                puts[k](S, mask, full)

        return run

    def op_stmatrix(self, ins, parts):
        n = int(next(p for p in parts if re.match(r"x\d", p))[1:])
        trans = "trans" in parts
        base, off = self.address(ins.args[0])
        r = self.reader(base, 32)
        rs = [self.reader(x.strip(), 32) for x in ins.args[1].strip("{} ").split(",")]

        def run(S, mask):
            self.whole_warps(S, mask, ins)
            lanes = self.lanes(S, mask)
            warps = len(lanes) // 32
            address = (r(S)[lanes].astype(np.int64) + off).reshape(warps, 32)
            for k in range(n):
                rows = address[:, 8 * k : 8 * k + 8]
                v = rs[k](S)[lanes].reshape(warps, 32)
                m = np.zeros((warps, 8, 8), U16)
                lane = np.arange(32)
                m[:, lane // 4, (lane % 4) * 2] = v.astype(U16)
                m[:, lane // 4, (lane % 4) * 2 + 1] = (v >> U32(16)).astype(U16)
                if trans:
                    m = m.transpose(0, 2, 1)
                a = rows[:, :, None] + np.arange(8)[None, None, :] * 2
                if (rows % 16).any():
                    raise Fault("misaligned stmatrix")
                who = np.repeat(lanes.reshape(warps, 32)[:, 8 * k : 8 * k + 8, None], 8, axis=2)
                S.store("shared", a.reshape(-1), 2, m.reshape(-1, 1), who.reshape(-1), ins)

        return run

    def op_mma(self, ins, parts):
        lists = [[x.strip() for x in a.strip("{} ").split(",")] for a in ins.args]
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        puts = [self.writer(x) for x in lists[0]]
        A = [self.reader(x, 32) for x in lists[1]]
        B = [self.reader(x, 32) for x in lists[2]]
        shape = parts[3]
        if shape == "m16n8k32" and parts[-4:] == ["s32", "s8", "s8", "s32"]:
            C = [self.reader(x, 32, "s") for x in lists[3]]

            def run(S, mask):
                self.whole_warps(S, mask, ins)
                a = np.zeros((self.W, 16, 32), np.int32)
                for i in range(16):
                    row = g + (0 if (i < 4 or 8 <= i < 12) else 8)
                    col = t * 4 + (i & 3) + (16 if i >= 8 else 0)
                    a[:, row, col] = A[i // 4](S).view(np.int8).reshape(self.W, 32, 4)[:, :, i & 3]
                b = np.zeros((self.W, 32, 8), np.int32)
                for i in range(8):
                    row = t * 4 + (i & 3) + (16 if i >= 4 else 0)
                    b[:, row, g] = B[i // 4](S).view(np.int8).reshape(self.W, 32, 4)[:, :, i & 3]
                p = np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64)
                for i in range(4):
                    row = g + (8 if i >= 2 else 0)
                    col = t * 2 + (i & 1)
                    v = p[:, row, col].reshape(-1) + C[i](S).astype(np.int64)
                    v = np.clip(v, -(2**31), 2**31 - 1) if "satfinite" in parts else v
                    puts[i](S, mask, v.astype(np.int32).view(U32))

            return run
        if (shape == "m16n8k16" and parts[-4:] == ["f32", "bf16", "bf16", "f32"]) or (
            shape == "m16n8k16" and parts[-4:] == ["f32", "f16", "f16", "f32"]
        ):
            C = [self.reader(x, 32, "f") for x in lists[3]]
            to_float = TO_FLOAT[parts[-2]]

            def values(x):
                return to_float(x.view(U16).reshape(self.W, 32, 2))

            def run(S, mask):
                self.whole_warps(S, mask, ins)
                a = np.zeros((self.W, 16, 16), np.float64)
                for i in range(8):
                    row = g + (0 if (i < 2 or 4 <= i < 6) else 8)
                    col = t * 2 + (i & 1) + (8 if i >= 4 else 0)
                    a[:, row, col] = values(A[i // 2](S))[:, :, i & 1]
                b = np.zeros((self.W, 16, 8), np.float64)
                for i in range(4):
                    row = t * 2 + (i & 1) + (8 if i >= 2 else 0)
                    b[:, row, g] = values(B[i // 2](S))[:, :, i & 1]
                p = np.matmul(a, b)
                for i in range(4):
                    row = g + (8 if i >= 2 else 0)
                    col = t * 2 + (i & 1)
                    v = p[:, row, col].reshape(-1) + C[i](S).astype(np.float64)
                    puts[i](S, mask, canon32(v.astype(np.float32)))

            return run
        raise Fault(ins.text)

    def op_wgmma(self, ins, parts):
        if parts[1] in ("fence",):
            return lambda S, mask: None
        if parts[1] == "commit_group":
            return lambda S, mask: None
        if parts[1] == "wait_group":
            return lambda S, mask: None
        N, summed = map(int, re.match(r"m64n(\d+)k(\d+)", parts[-4]).groups())
        element = parts[-1]
        if parts[-3:] not in (["s32", "s8", "s8"], ["f32", "bf16", "bf16"], ["f32", "f16", "f16"]):
            raise Fault(ins.text)
        is_integer = element == "s8"
        size = 1 if is_integer else 2  # bytes of an element
        if not is_integer and ins.args[4:6] != ["1", "1"]:
            raise Fault("negated operands: " + ins.text)
        turned_a, turned_b = (False, False) if is_integer else (x == "1" for x in ins.args[-2:])
        if ins.args[1].startswith("{") and not is_integer:
            turned_a, turned_b = False, ins.args[-1] == "1"

        def values(bits):
            """Return the FP64 values of elements whose bytes are along the last axis."""
            if is_integer:
                return bits.view(np.int8).astype(np.float64)
            return TO_FLOAT[element](np.ascontiguousarray(bits).view(U16)).astype(np.float64)

        ds = [x.strip() for x in ins.args[0].strip("{} ").split(",")]
        puts = [self.writer(x) for x in ds]
        Rd = [self.reader(x, 32, "s" if is_integer else "f") for x in ds]
        a_regs = None
        if ins.args[1].startswith("{"):
            a_regs = [self.reader(x.strip(), 32) for x in ins.args[1].strip("{} ").split(",")]
        else:
            ra = self.reader(ins.args[1], 64)
        rb = self.reader(ins.args[2], 64)
        rp = self.reader(ins.args[3], 1)
        lane128 = np.arange(128)
        w, lane = lane128 // 32, lane128 % 32
        g, t = lane // 4, lane % 4

        def matrix(S, desc, rows, lanes, *, is_turned):
            """[rows, summed] operand by its descriptor, in the order of CUTLASS's mma_sm90_desc."""
            start = (desc & 0x3FFF) << 4
            leading = ((desc >> 16) & 0x3FFF) << 4
            stride = ((desc >> 32) & 0x3FFF) << 4
            swizzle = (desc >> 62) & 3
            if (desc >> 49) & 7:
                raise Fault("base offset in descriptor")
            width = {1: 128, 2: 64, 3: 32, 0: 16}[swizzle]
            if width == 16:
                raise Fault("no swizzle: unsupported here")
            row = np.arange(rows)[:, None]
            k = np.arange(summed)[None, :]
            if is_turned:  # rows side by side: `width` bytes of them, for each of eight k
                n = width // size
                a = start + row // n * leading + row % n * size + k // 8 * stride + k % 8 * width
            else:
                a = start + row // 8 * stride + row % 8 * width + k * size
            # The swizzle is applied to the address bits.
            bits = {128: 7, 64: 3, 32: 1}[width]
            a = a ^ (((a >> 7) & bits) << 4)
            who = np.full(a.size, lanes[0])
            v = S.load("shared", a.reshape(-1), size, 1, who, ins)[:, 0]
            return values(v.view(U8)).reshape(rows, summed)

        def run(S, mask):
            self.whole_warps(S, mask, ins)
            groups = self.T // 128
            outs = [Rd_(S).copy() for Rd_ in Rd]
            for k in range(groups):
                lanes = np.arange(128 * k, 128 * k + 128)
                if mask is not None and not mask[lanes].all():
                    if mask[lanes].any():
                        raise Fault("divergent warpgroup")
                    continue
                db = rb(S)[lanes]
                if (db != db[0]).any():
                    raise Fault("descriptor differs in a warpgroup")
                if a_regs is None:
                    da = ra(S)[lanes]
                    if (da != da[0]).any():
                        raise Fault("descriptor differs in a warpgroup")
                    a = matrix(S, int(da[0]), 64, lanes, is_turned=turned_a)
                elif not is_integer:
                    a = np.zeros((64, 16))
                    for i in range(8):
                        row = w * 16 + g + (0 if (i < 2 or 4 <= i < 6) else 8)
                        col = t * 2 + (i & 1) + (8 if i >= 4 else 0)
                        pair = values(a_regs[i // 2](S)[lanes].view(U8)).reshape(128, 2)
                        a[row, col] = pair[:, i & 1]
                else:
                    a = np.zeros((64, 32))
                    for i in range(16):
                        row = w * 16 + g + (0 if (i < 4 or 8 <= i < 12) else 8)
                        col = t * 4 + (i & 3) + (16 if i >= 8 else 0)
                        a[row, col] = (
                            a_regs[i // 4](S)[lanes].view(np.int8).reshape(128, 4)[:, i & 3]
                        )
                b = matrix(S, int(db[0]), N, lanes, is_turned=turned_b)
                p = a @ b.T
                scale = rp(S)[lanes]
                for i in range(len(ds)):
                    # d[i]: row = 16 w + g (+8 if bit 1), column = 8 * (i // 4) + 2 t + (i & 1)
                    row = w * 16 + g + (8 if i & 2 else 0)
                    col = 8 * (i // 4) + 2 * t + (i & 1)
                    v = p[row, col] + np.where(scale, outs[i][lanes].astype(np.float64), 0)
                    outs[i][lanes] = v.astype(outs[i].dtype)
            for p_, o in zip(puts, outs, strict=True):
                p_(S, mask, o.view(U32))

        return run

    # ---- run a grid

    def launch(self, grid, values, memory, order=None):
        blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
        if order is not None:
            blocks = [blocks[i] for i in order(len(blocks))]
        for n, b in enumerate(blocks):
            State(self, b, grid, values, memory, n).run()


def f16_of(x):
    with np.errstate(all="ignore"):
        h = x.astype(np.float16).view(U16)
    return np.where(x != x, U16(0x7FFF), h)


class State:
    def __init__(self, kernel, ctaid, nctaid, values, memory, block):
        self.K = kernel
        self.ctaid, self.nctaid, self.values, self.memory = ctaid, nctaid, values, memory
        self.block = block
        T = kernel.T
        rng = np.random.default_rng(0)
        junk32 = rng.integers(0, 2**32, T, dtype=np.uint64)
        self.R = Registers(T, junk32)
        self.R.K = kernel
        n = (kernel.shared_bytes + 15) // 16 * 16
        self.shared = rng.integers(0, 256, n, dtype=np.uint8)
        self.sviews = {w: self.shared.view(UINT[8 * w]) for w in (1, 2, 4, 8)}
        self.sshadow = Shadow(n)
        self.epoch = 0
        self.wepoch = np.zeros(kernel.W, np.int64)
        self.pending, self.groups = [], []
        for r in memory.regions:
            if r.shadow is None:
                r.shadow = Shadow(len(r.bytes))

    def param(self, name, bits):
        v = self.values[name]
        return np.full(self.K.T, v & ((1 << bits) - 1), dtype=UINT[bits])

    # ---- memory

    def load(self, space, address, size, vec, lanes, ins, atomic=False, no_race=False):
        n = len(address)
        dt = UINT[8 * size]
        if n == 0:
            return np.zeros((0, vec), dt)
        if space == "shared":
            o = address - SMEM_BASE
            self.check_shared(o, size * vec, ins)
            if not no_race:
                self.note_read(self.sshadow, o, size * vec, lanes, ins, "shared")
            idx = (o // size)[:, None] + np.arange(vec)[None, :]
            return self.sviews[size][idx]
        out = np.empty((n, vec), dt)
        for region, sel, o in self.memory.locate(address, size * vec, ins.text):
            idx = (o // size)[:, None] + np.arange(vec)[None, :]
            out[sel] = region.views[size][idx]
            if not atomic:
                self.note_read(region.shadow, o, size * vec, lanes[sel], ins, region.name)
        return out

    def store(self, space, address, size, values, lanes, ins):
        n, vec = values.shape
        if n == 0:
            return
        if space == "shared":
            o = address - SMEM_BASE
            self.check_shared(o, size * vec, ins)
            self.note_write(self.sshadow, o, size * vec, values, lanes, ins, "shared")
            idx = (o // size)[:, None] + np.arange(vec)[None, :]
            self.sviews[size][idx] = values
            return
        for region, sel, o in self.memory.locate(address, size * vec, ins.text):
            self.note_write(region.shadow, o, size * vec, values[sel], lanes[sel], ins, region.name)
            idx = (o // size)[:, None] + np.arange(vec)[None, :]
            region.views[size][idx] = values[sel]

    def check_shared(self, o, width, ins):
        if (o % width).any():
            raise Fault(f"misaligned shared access: {ins.text}")
        if (o < 0).any() or (o + width > self.K.shared_bytes).any():
            raise Fault(
                f"shared access outside of {self.K.shared_bytes} bytes: {ins.text}: {o.max()}"
            )

    # ---- races

    def note_read(self, sh, o, width, lanes, ins, where):
        for b in range(width):
            p = o + b
            w = (sh.we[p] == self.epoch) & (sh.wb[p] == self.block) & (sh.wt[p] != lanes)
            if w.any():
                # same warp after bar.warp.sync is ordered
                same = (sh.wt[p] >> 5) == (lanes >> 5)
                kind = "warp" if (same | ~w).all() else "block"
                raise Fault(
                    f"{self.K.name}: read after write by another thread of the {kind}, "
                    f"{where}: {ins.op} [{ins.line}]"
                )
            foreign = (sh.wb[p] >= 0) & (sh.wb[p] != self.block)
            if where != "shared" and foreign.any():
                raise Fault(f"{self.K.name}: reads what another block wrote, {where}: {ins.op}")
            fresh = sh.re[p] != self.epoch
            sh.rt[p] = np.where(fresh | (sh.rt[p] == lanes), lanes, -2)
            sh.re[p] = self.epoch
            if len(np.unique(p)) != len(p):
                u, c = np.unique(p, return_counts=True)
                sh.rt[u[c > 1]] = -2
            sh.rb[p] = self.block

    def note_write(self, sh, o, width, values, lanes, ins, where):
        flat = np.ascontiguousarray(values).view(U8).reshape(len(o), -1)
        for b in range(width):
            p = o + b
            if where != "shared":
                foreign = ((sh.wb[p] >= 0) & (sh.wb[p] != self.block)) | (
                    (sh.rb[p] >= 0) & (sh.rb[p] != self.block)
                )
                if foreign.any():
                    raise Fault(
                        f"{self.K.name}: writes what another block touched, {where}: {ins.op}"
                    )
            r = (sh.re[p] == self.epoch) & (sh.rb[p] == self.block) & (sh.rt[p] != lanes)
            if r.any():
                same = (sh.rt[p] >> 5) == (lanes >> 5)
                kind = "warp" if (same | ~r).all() else "block"
                raise Fault(
                    f"{self.K.name}: write after read by another thread of the {kind}, "
                    f"{where}: {ins.op} [{ins.line}]"
                )
            w = (
                (sh.we[p] == self.epoch)
                & (sh.wb[p] == self.block)
                & (sh.wt[p] != lanes)
                & (sh.wv[p] != flat[:, b])
            )
            if w.any():
                raise Fault(f"{self.K.name}: two threads write different values, {where}: {ins.op}")
            # within this one instruction
            if len(np.unique(p)) != len(p):
                for q in np.unique(p)[np.unique(p, return_counts=True)[1] > 1]:
                    if len(np.unique(flat[p == q, b])) > 1:
                        raise Fault(
                            f"{self.K.name}: one store, different values, {where}: {ins.op}"
                        )
            sh.wt[p], sh.we[p], sh.wb[p], sh.wv[p] = lanes, self.epoch, self.block, flat[:, b]

    def warp_sync(self, mask):
        # Counts as a barrier of the block, even if warps continue independently.
        self.epoch += 1

    # ---- asynchronous copies

    def cp_issue(self, da, sa, size, n, lanes, ins):
        o = da - SMEM_BASE
        self.check_shared(o, size, ins)
        keep = n > 0
        self.memory.locate(sa[keep], size, ins.text)  # bounds now
        self.pending.append((o, sa, size, n, lanes, ins))

    def cp_commit(self):
        self.groups.append(self.pending)
        self.pending = []

    def cp_wait(self, n):
        while len(self.groups) > n:
            for o, sa, size, count, lanes, ins in self.groups.pop(0):
                data = np.zeros((len(o), size), U8)
                keep = count > 0
                if keep.any():
                    for region, sel, so in self.memory.locate(sa[keep], size, ins.text):
                        rows = np.nonzero(keep)[0][sel]
                        data[rows] = region.bytes[so[:, None] + np.arange(size)[None, :]]
                if (count < size).any():
                    data[np.arange(size)[None, :] >= count[:, None]] = 0
                self.note_write(self.sshadow, o, size, data, lanes, ins, "shared")
                idx = o[:, None] + np.arange(size)[None, :]
                self.shared[idx] = data

    # ---- scheduling

    def run(self):
        K = self.K
        T = K.T
        instrs, compiled = K.instrs, K.compiled
        everyone = np.ones(T, bool)
        ready = [[0, everyone]]
        waiting = []
        live = everyone.copy()
        steps = 0
        while ready or waiting:
            if not ready:
                parked = np.zeros(T, bool)
                for _, m in waiting:
                    parked |= m
                if not (parked == live).all():
                    raise Fault("barrier that some threads never reach")
                self.epoch += 1
                by = {}
                for pc, m in waiting:
                    by[pc] = by[pc] | m if pc in by else m
                ready = [[pc, m] for pc, m in by.items()]
                waiting = []
            # Run the earliest code first, so that paths join again.
            ready.sort(key=lambda x: x[0])
            pc, mask = ready.pop(0)
            while ready and ready[0][0] == pc:
                mask = mask | ready.pop(0)[1]
            whole = bool(mask.all())
            while True:
                if pc >= len(instrs):
                    live = live & ~mask
                    break
                if ready and ready[0][0] == pc:
                    mask = mask | ready.pop(0)[1]
                    whole = bool(mask.all())
                elif ready and ready[0][0] < pc:
                    ready.append([pc, mask])
                    break
                ins, f = instrs[pc], compiled[pc]
                steps += 1
                if steps > 5_000_000:
                    raise Fault("endless loop")
                if f.__class__ is str:
                    m = mask
                    if ins.pred is not None:
                        p = self.R[ins.pred]
                        m = mask & (~p if ins.neg else p)
                    if f == "bra":
                        taken = m.any()
                        if not taken:
                            pc += 1
                            continue
                        if (m == mask).all():
                            pc = ins.target
                            if ready:
                                ready.append([pc, mask])
                                break
                            continue
                        ready.append([ins.target, m])
                        ready.append([pc + 1, mask & ~m])
                        break
                    if f == "ret":
                        live = live & ~m
                        mask = mask & ~m
                        if not mask.any():
                            break
                        whole = False
                        pc += 1
                        continue
                    if f == "bar":
                        if ins.pred is not None:
                            raise Fault("predicated barrier")
                        waiting.append([pc + 1, mask])
                        break
                if ins.pred is None:
                    f(self, None if whole else mask)
                else:
                    p = self.R[ins.pred]
                    f(self, mask & (~p if ins.neg else p))
                pc += 1


class Registers(dict):
    """Registers hold garbage until they are written."""

    def __init__(self, T, junk):
        super().__init__()
        self.T, self.junk = T, junk

    def __missing__(self, name):
        w = WIDTH[REG.match(name).group(1)]
        if w == 1:
            v = (self.junk & U64(1)).astype(bool)
        else:
            v = (self.junk * U64(0x9E3779B97F4A7C15)).astype(UINT[w])
        self[name] = v
        return v

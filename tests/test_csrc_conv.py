"""The compiled convolutions without a GPU: what makes them fast is in their machine code, and nothing that makes them
slow."""

from __future__ import annotations

import re

import pytest

from tests.machine_code import FACTS, needs_kernels, resources, sass_archs, whole_code

CONVOLUTIONS = FACTS.get("conv", [])
each_convolution = pytest.mark.parametrize(
    "instance", CONVOLUTIONS, ids=[f"{i['name']} {i['dtype']}".replace(" ", "-") for i in CONVOLUTIONS]
)


def convolution_code(instance):
    """{architecture: SASS} of an instance, from the one kernel that has its name."""
    m, n, _ = instance["tile"]
    element = {"float16": ("cutlass::half_t", "__half"), "bfloat16": ("cutlass::bfloat16_t", "__nv_bfloat16")}
    cutlass, cuda_type = element[instance["dtype"]]
    if instance["parts"]:
        tile = rf"conv_split_kernel<{cuda_type}, (?:\(int\))?{instance['parts']}>"
    elif by_lines(instance):
        tile = rf"conv_lines_kernel<{cuda_type}>"
    elif instance["arch"] == 90:
        schedule = ["pingpong", "cooperative", "stream-k"].index(instance["name"].split()[2])
        cluster = ", ".join(map(str, instance["cluster"]))
        tile = rf"conv::Sm90<{cutlass}, {m}, {n}, {cluster}, \(fused_resnet::conv::Schedule\){schedule}>"
    else:
        tile = rf"conv_sm80_kernel<{cuda_type}, (?:\(int\))?{m}, (?:\(int\))?{n},"
    found = {}
    for arch in instance["registers"]:
        (found[arch],) = (code for name, code in whole_code(arch).items() if re.search(tile, name))
    return found


def by_lines(instance):
    return instance["name"] == "sm90 lines 64 -> 64"


def count(pattern, code):
    return len(re.findall(pattern, code))


@needs_kernels
def test_convolutions_are_there_for_what_was_asked():
    asked = {"sm_90a": 90} | {arch: 80 for arch in sass_archs() if arch != "sm_90a"}
    if FACTS["conv_missing"] is None:
        assert {i["arch"] for i in CONVOLUTIONS} == {asked[arch] for arch in sass_archs()} or "sm_90a" not in asked
    else:
        assert len(FACTS["conv_missing"]) > 20
    for dtype in ("float16", "bfloat16"):
        tiles = [tuple(i["tile"]) for i in CONVOLUTIONS if i["dtype"] == dtype and i["arch"] == 80]
        assert len(tiles) == len(set(tiles))


@each_convolution
def test_the_compiler_had_nothing_to_say(instance):
    """No spill, no C7510 or its like: wgmma instructions that wait for one another."""
    assert instance["warnings"] == []
    assert instance["registers"]


@each_convolution
def test_convolutions_fit_the_chip(instance):
    for registers in instance["registers"].values():
        assert registers <= 255
        assert registers * instance["threads"] <= 65536
    if instance["parts"]:  # a block of the next kernel finds room beside it
        assert instance["threads"] == 160 and max(instance["registers"].values()) * 160 * 2 <= 65536
        assert 2 * (instance["shared_bytes"] + 1024) <= 228 << 10
    elif instance["arch"] == 90:
        assert instance["threads"] == 3 * 128 and instance["shared_bytes"] <= 227 << 10
        assert instance["stages"] >= 4, "fewer do not hide the latency of memory"
    else:
        assert instance["shared_bytes"] <= 99 << 10, "sm_86 and sm_89 have no more"
        if instance["threads"] == 128:  # two blocks a multiprocessor of sm_80: one computes while the other stores
            assert 2 * (instance["shared_bytes"] + 1024) <= 164 << 10
            assert max(instance["registers"].values()) * 128 * 2 <= 65536


@each_convolution
def test_machine_code_of_convolutions(instance):
    m, n, k = instance["tile"]
    kind = r"F32\.BF16\b" if instance["dtype"] == "bfloat16" else r"F32(?!\.)"
    for code in convolution_code(instance).values():
        assert not re.search(r"\b(LDL|STL)\b", code)
        assert not re.search(r"\b(RED|ATOMS)\b.*F32", code), "sums have one order"
        assert count(r"FMNMX\.NAN", code) > 0, "a NaN goes through the ReLU"
        if instance["parts"]:
            assert count(rf"HGMMA\.64x64x16\.{kind}", code) == count(r"\bHGMMA", code) > 0
            assert count(r"\bHGMMA", code) % 4 == 0, "the four sixteenths of a step"
            assert count(r"UTMALDG\.4D\.IM2COL", code) > 0 and count(r"UTMALDG\.3D", code) > 0
            assert count(r"\bMEMBAR", code) == 0, "blocks wait for what comes, not for all that is under way"
            shared = instance["parts"] > 1
            assert count(r"\bSTAS\.64", code) == (16 if shared else 0), "sums are pushed to other blocks"
            assert count(r"UCGABAR_ARV", code) == (1 if shared else 0)
            assert count(r"\bPREEXIT\b", code) == 1 and count(r"\bACQBULK\b", code) == 2, "kernels overlap"
            assert count(r"STG\.E\.64", code) == count(r"\bSTG", code) == 8 // instance["parts"]
        elif by_lines(instance):
            # Three lines in turns, each multiplied by nine taps from registers, where wide loads put it for three.
            assert count(rf"HGMMA\.64x64x16\.{kind} R\d+, R\d+, gdesc", code) == count(r"\bHGMMA", code) == 3 * 4 * 9
            assert count(r"LDSM\.16\.M88\.4", code) == count(r"\bLDSM", code) == 3 * 4 * 3
            assert count(r"LDG\.E\.NA\.128", code) == count(r"STG\.E\.128", code) == count(r"\bSTG", code) == 3 * 4
            assert count(r"UTMALDG\.3D", code) > 0 and count(r"UTMALDG\.4D(?!\.IM2COL)", code) > 0
            assert count(r"USETMAXREG", code) == 2 and count(r"\bLDGSTS\b", code) == 0
            assert count(r"\bPREEXIT\b", code) == 1 and count(r"\bACQBULK\b", code) == 3, "kernels overlap"
        elif instance["arch"] == 90:
            groups = 1 if "pingpong" in instance["name"] else 2
            # The first step and the loop's, four sixteenths each; a warp group has M / groups rows, 64 at a time.
            wanted = 2 * (k // 16) * (m // groups // 64)
            assert count(rf"HGMMA\.64x{n}x16\.{kind}", code) == wanted
            assert count(r"\bHGMMA", code) == wanted
            along_m, along_n = instance["cluster"]
            assert count(r"UTMALDG\.4D\.IM2COL", code) == 1, "x"
            assert count(r"UTMALDG\.4D\.IM2COL\.MULTICAST", code) == (1 if along_n > 1 else 0)
            assert count(r"UTMALDG\.3D\.MULTICAST", code) == (1 if along_m > 1 else 0), "weights"
            assert count(r"UTMASTG", code) > 0, "y leaves through the tensor memory accelerator"
            assert count(r"USETMAXREG", code) == 2, "registers go from the producer to the consumers"
            assert count(r"\b(LDGSTS|STG)\b", code) == 0 or instance["splits"]
            for instruction in ("PREEXIT", "ACQBULK"):
                assert (count(rf"\b{instruction}\b", code) > 0) != instance["splits"], "kernels overlap"
        else:
            warps = instance["threads"] // 32
            instructions = m * n * k // (16 * 8 * 16) // warps  # of a warp and a step; the compiler may unroll steps
            assert count(r"\bHMMA", code) == count(rf"HMMA\.16816\.{kind}", code) > 0
            assert count(r"\bHMMA", code) % instructions == 0
            copies = (m + n) * k // 8 // instance["threads"]
            copied = count(r"LDGSTS\.E\.BYPASS\S*\.128", code)
            assert copied == count(r"\bLDGSTS", code) >= 2 * copies, "before the loop, and in it"
            # Each matrix instruction's operands by wide loads: a sixteenth is (M / 16 + N / 16) / warps along an edge.
            assert count(r"LDSM\.16\.M88\.4", code) > 0 and count(r"LDSM\.16\.M88(?!\.4)", code) == 0
            assert count(r"STG\.E\.128", code) > 0 and count(r"STG\.E(?!\.128)", code) == 0


# Chains


CHAINS = FACTS.get("chain", [])
each_chain = pytest.mark.parametrize(
    "chain", CHAINS, ids=[f"{c['name']} {c['dtype']}".replace(" ", "-") for c in CHAINS]
)


@needs_kernels
def test_chains_are_there_for_hopper():
    kinds = {(c["dtype"], c["middle"], c["following"], c["segment"], c["by_lines"]) for c in CHAINS}
    assert len(kinds) == len(CHAINS) == (14 if "sm_90a" in sass_archs() else 0)


@each_chain
def test_machine_code_of_chains(chain):
    assert chain["warnings"] == [] and chain["registers"] == {"sm_90a": 168}
    assert chain["threads"] == 3 * 128 and chain["shared_bytes"] <= 227 << 10
    element = {"float16": "__half", "bfloat16": "__nv_bfloat16"}[chain["dtype"]]
    following, segment = chain["following"] // 64, chain["segment"]
    streams = chain["middle"] == 128
    kernel, flag = "lines" if chain["by_lines"] else "sm90", "1|true" if segment else "0|false"
    kind = rf"chain_{kernel}_kernel<{element}, (?:\(int\))?{following}, (?:\(bool\))?(?:{flag})>"
    kind = rf"chain_stream_kernel<{element}>" if streams else kind
    (code,) = (code for name, code in whole_code("sm_90a").items() if re.search(kind, name))
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert count(r"\bHGMMA\.64x64x16\.F32", code) == count(r"\bHGMMA", code)
    assert count(r"USETMAXREG", code) == 2
    assert count(r"STG\.E\.128", code) == count(r"\bSTG", code) > 0
    assert count(r"\bLDGSTS\b", code) == 0
    assert count(r"\bPREEXIT\b", code) == 1, "kernels overlap"
    if not chain["by_lines"]:
        # Four sixteenths each: the 3x3's first tap and its others, the expand, the projection, the next reduce.
        assert count(r"\bHGMMA", code) % 4 == 0 and count(r"\bHGMMA", code) >= 4 * (2 + segment + following)
        assert count(r"UTMALDG\.4D\.IM2COL", code) > 0 and count(r"UTMALDG\.3D", code) > 0
        assert count(r"\bACQBULK\b", code) == 2
        return
    assert count(r"UTMALDG\.4D(?!\.IM2COL)", code) > 0 and count(r"UTMALDG\.3D", code) > 0
    assert count(r"LDSM\.16\.M88\.4", code) == count(r"\bLDSM", code)
    if streams:
        # Of the 3x3 a row of taps, two blocks of channels before and behind; then the first expand, the loop's and the
        # last reduce. The operand of a tap is loaded while the one before is multiplied.
        assert count(r"\bHGMMA", code) == 4 * (3 * 2 * 2 + 2 + 4 + 2)
        assert count(r"\bLDSM", code) == 4 * (3 * 2 + 1)
        assert count(r"\bACQBULK\b", code) == 3
        return
    # The same, all taps and all four tiles of y unrolled; left operands from registers, of lines by wide loads.
    assert count(r"\bHGMMA", code) == 4 * (9 + 4 * (1 + segment + following))
    assert count(r"\bLDSM", code) == 4 * 9
    # What is added or multiplied again: 16 bytes of half a tile's row.
    assert count(r"LDG\.E\.128\S*\.NA|LDG\.E\.NA\.128", code) == (4 if segment else 16)
    assert count(r"\bACQBULK\b", code) == 3


# The stem


@needs_kernels
@pytest.mark.parametrize("arch", [arch for arch in sass_archs() if int(arch[3:].rstrip("af")) >= 80])
@pytest.mark.parametrize("element", ["__half", "__nv_bfloat16"])
@pytest.mark.parametrize("pools", [True, False], ids=["pool", "convolution"])
def test_machine_code_of_the_stem(arch, element, pools):
    demangled, mangled = f"stem_kernel<{element}, {str(pools).lower()}>", rf"stem_kernelI\d+{element}Lb{pools:d}E"
    (code,) = (code for name, code in whole_code(arch).items() if demangled in name)
    (used,) = (used for name, used in resources(arch).items() if re.search(mangled, name))
    registers, stack, _, local = used
    assert registers <= 128 and stack == local == 0, "two blocks of 256 threads a multiprocessor"
    assert not re.search(r"\b(LDL|STL)\b", code)
    kind = r"F32\.BF16\b" if element == "__nv_bfloat16" else r"F32(?!\.)"
    # 14 sixteenths of the reduction by 8 times 8 channels, of two rows of the convolution and, for the pool, of one.
    assert count(r"\bHMMA", code) == count(rf"HMMA\.16816\.{kind}", code) == (2 + pools) * 14 * 8
    # Of the filters and of 9 rows of x; in the loop of one row of the convolution, of 7 rows.
    loads = 14 * 4 + 2 * 9 + (14 * 4 + 2 * 7) * pools
    assert count(r"\bLDSM", code) == count(r"LDSM\.16\.M88\.4", code) == loads
    loop = code[[m.start() for m in re.finditer(r"\bHMMA", code)][14 * 8 * pools] : code.rindex("HMMA")]
    assert count(r"\b(IMAD\.)?MOV\b", loop) < 16, "fragments are not copied"
    assert len(re.findall(r";", loop)) < 2 * count(r"\bHMMA", loop)
    assert count(r"STG\.E\.128", code) == count(r"\bSTG", code) == (2 if pools else 8)
    assert count(r"HMNMX2?\.(BF16_V2\.)?NAN", code) == count(r"HMNMX", code)
    assert (count(r"HMNMX", code) > 0) is pools, "a NaN goes through the maxima"


@needs_kernels
@pytest.mark.parametrize("arch", [arch for arch in sass_archs() if int(arch[3:].rstrip("af")) >= 80])
@pytest.mark.parametrize("element", ["__half", "__nv_bfloat16"])
def test_machine_code_of_the_stems_weight_gradient(arch, element):
    (code,) = (code for name, code in whole_code(arch).items() if f"stem_weight_kernel<{element}>" in name)
    (used,) = (used for name, used in resources(arch).items() if re.search(rf"stem_weight_kernelI\d+{element}E", name))
    registers, stack, _, local = used
    assert registers <= 128 and stack == local == 0, "two blocks of 256 threads, as shared memory allows"
    assert not re.search(r"\b(LDL|STL)\b", code)
    assert count(r"\bBAR\.SYNC", code) == 2, "before the loop, and between its turns: the emulation misses neither"
    kind = r"F32\.BF16\b" if element == "__nv_bfloat16" else r"F32(?!\.)"
    # Two rows of g by 7 filter rows and two halves of a warp's channels, within the map and at its edge.
    assert count(r"\bHMMA", code) == count(rf"HMMA\.16816\.{kind}", code) == 2 * 28
    # Of g two halves of two rows, of x nine rows by twos.
    assert count(r"\bLDSM", code) == count(r"LDSM\.16\.MT88\.4", code) == 2 * (4 + 5)
    loop = code[code.index("HMMA") : [m.start() for m in re.finditer(r"\bHMMA", code)][27]]
    assert len(re.findall(r";", loop)) < 2 * 28 and count(r"\b(IMAD\.)?MOV\b", loop) < 4
    assert count(r"LDGSTS\.E\.BYPASS\S*\.128", code) == count(r"\bLDGSTS", code) == 2 * 7
    assert count(r"STG\.E\.64", code) == count(r"\bSTG", code) == 28

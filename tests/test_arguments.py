"""Arguments of the wrong type, range or kind are refused in one line, for every function of the API alike."""

from __future__ import annotations

import inspect
import math
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from robx import api
from robx.arguments import check_types, checked, naming_arguments, types_of
from robx.errors import InputError
from robx.ship.run import Shipped


def _takes(
    *,
    path: str | os.PathLike[str] | None = None,
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    count: int | None = None,
    share: float = 1.0,
    on: bool = False,
    kind: Literal["a", "b", "c"] = "a",
    cores: Sequence[int] | str | None = None,
    size: int | str | tuple[int, int] | None = None,
    report: Callable[[int], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    return {"count": count, "share": share, "cores": cores}


KINDS = types_of(_takes)


@pytest.mark.parametrize(
    "given",
    [
        {"path": Path("a"), "paths": ["a", Path("b")]}, {"path": None, "paths": "a"}, {"share": 2, "count": 3},
        {"cores": "0,1"}, {"cores": (0, 1)}, {"size": (3, 4)}, {"size": "3x4"}, {"report": print}, {"kind": "c"},
    ],
)  # fmt: skip
def test_values_of_the_right_type_are_returned(given: dict[str, Any]) -> None:
    assert check_types(KINDS, given) == given


def test_numbers_of_numpy_become_those_of_python() -> None:
    found = checked(_takes)(count=np.int64(3), share=np.float32(0.5), cores=[np.int32(1)])  # type: ignore[arg-type]
    assert (type(found["count"]), type(found["share"]), type(found["cores"][0])) == (int, float, int)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": 5}, "path must be a path, got 5"),
        ({"path": ""}, "path is an empty path: give a path, or . for the current folder"),
        ({"paths": ["a", ""]}, "paths is an empty path: give a path, or . for the current folder"),
        ({"paths": [5]}, "paths must be a path or a list of paths, got [5]"),
        ({"count": "3"}, "count must be a whole number, got '3'"),
        ({"count": True}, "count must be a whole number, got True"),
        ({"count": 1.5}, "count must be a whole number, got 1.5"),
        ({"share": "x"}, "share must be a number, got 'x'"),
        ({"share": math.nan}, "share must be a finite number, got nan"),
        ({"on": "no"}, "on must be true or false, got 'no'"),
        ({"on": 1}, "on must be true or false, got 1"),
        ({"kind": "d"}, "kind must be one of 'a', 'b', 'c', got 'd'"),
        ({"cores": 0}, "cores must be a list of whole numbers or a string, got 0"),
        ({"size": [3]}, "size must be a whole number, a string or a list of 2 whole numbers, got [3]"),
        ({"report": "x"}, "report must be a function, got 'x'"),
    ],
)
def test_other_values_are_refused_in_words(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_types(KINDS, given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("function", "message", "named"),
    [
        (api.distill, "--epochs: 0 is too few", "epochs: 0 is too few"),
        (api.distill, "give --lr 12 (docker run --shm-size)", "give lr=12 (docker run --shm-size)"),
        (api.distill, "give --teacher-weights FILE, or --teacher ema", "give teacher_weights=FILE, or teacher ema"),
        (api.export, "--max-drop must be at most 100; try --rungs", "max_drop must be at most 100; try candidates"),
        (api.export, "see robx distill --help: --data is missing", "see robx distill --help: data is missing"),
        (api.evaluate, "--transfer x has no folder, --no-cache", "transfers x has no folder, no_cache"),
        (api.bench, "--unknown stays, and a--batch", "--unknown stays, and a--batch"),
    ],
)  # fmt: skip
def test_errors_of_the_api_name_arguments_instead_of_options(
    function: Callable[..., Any], message: str, named: str
) -> None:
    assert naming_arguments(message, function) == named


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.export("r", format="onnx", rungs=0), r"export\(\) has no argument 'rungs': did you mean cand"),
        (lambda: api.export("r", fmt="onnx"), r"export\(\) has no argument 'fmt': did you mean format\?"),
        (lambda: api.export(run="r", format="onnx"), r"export\(\) has no argument 'run': did you mean student\?"),
        (lambda: api.export("r", format="onnx", zzz=1), r"export\(\) has no argument 'zzz': its arguments are stud"),
        (lambda: api.export("r"), r"export\(\) needs format: give format=\.\.\."),
        (lambda: api.export("r", student="r", format="onnx"), r"export\(\): multiple values for argument 'student'"),
        (lambda: api.evaluate("r", transfer=["x"]), r"evaluate\(\) has no argument 'transfer': did you mean transfers"),
        (lambda: api.evaluate(folders="r"), r"evaluate\(\) has no argument 'folders': did you mean models\?"),
        (lambda: api.report("r", budget=[1]), r"report\(\) has no argument 'budget': did you mean budgets\?"),
        (lambda: api.load(), r"load\(\) needs run: give run=\.\.\."),
        (lambda: api.distill("t", "s"), r"distill\(\) takes every argument by its name, got 2 without: write them as"),
        (lambda: api.bench("b", "c"), r"bench\(\) takes only bundles without a name, got 2 without: .* device=\.\.\."),
        (lambda: api.load("r", "s"), r"^load\(\) has 2 arguments, which is too many: its arguments are run$"),
        (lambda: api.distill(student="s", data="d"), r"distill\(\) needs out: give out=\.\.\."),
        (lambda: api.distill(student="s", data="d", out="o", mixop=1), r"'mixop': did you mean mixup"),
        (lambda: api.distill(student="s", data="d", out="o", store_k=9), r"'store_k': did you mean stored_k\?"),
        (lambda: api.distill(student="s", data="d", out="o", worker=9), r"'worker': did you mean workers"),
    ],
)  # fmt: skip
def test_a_call_that_does_not_fit_the_function_says_how_to_write_it(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


SHIPPED = Shipped(student=Path("s"), bundles=(), report=None)
EMBEDDER = api.Embedder(session=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EMBEDDER.embed([], batchsize=8), r"^embed\(\) has no argument 'batchsize': did you mean batch"),
        (lambda: EMBEDDER.embed([], zzz=8), r"^embed\(\) has no argument 'zzz': its arguments are images, batch$"),
        (lambda: EMBEDDER.embed(), r"^embed\(\) needs images: give images=\.\.\.$"),
        (lambda: EMBEDDER.embed([], 8), r"^embed\(\) takes only images without a name, got 2 without: .* batch=\.\.\."),
        (lambda: EMBEDDER.embed([], images=[]), r"^embed\(\): multiple values for argument 'images': give each"),
        (lambda: EMBEDDER.embed([], batch="8"), r"^batch must be a whole number, got '8'$"),
        (lambda: EMBEDDER.close(force=True), r"^close\(\) has no argument 'force': it takes none$"),
        (lambda: EMBEDDER.close(1), r"^close\(\) has 1 argument, which is too many: it takes none$"),
        (lambda: SHIPPED.to_dict(indent=2), r"^to_dict\(\) has no argument 'indent': it takes none$"),
    ],
)  # fmt: skip
def test_methods_of_what_the_api_returns_refuse_a_wrong_call_as_its_functions_do(
    call: Callable[[], Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_every_public_function_and_method_of_the_api_is_checked() -> None:
    defined = [value for value in vars(api).values() if getattr(value, "__module__", "") == api.__name__]
    functions = [value for value in defined if inspect.isfunction(value)]
    classes = [value for value in defined if inspect.isclass(value)]
    methods = [value for each in (*classes, Shipped) for value in vars(each).values() if inspect.isfunction(value)]
    public = [each for each in (*functions, *methods) if not each.__name__.startswith("_")]
    assert len(public) > 9
    assert not [each.__name__ for each in public if not hasattr(each, "__wrapped__")]


def test_an_error_of_the_api_names_the_argument(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"student": "test_resnet", "teacher": "ema", "out": tmp_path / "o"}
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"^epochs must be a whole number, got '3'$"):
        api.distill(data=tmp_path, epochs="3", progress=None, **settings)
    with pytest.raises(InputError, match=r"^recipe: mixup must be a number, got 'x'$"):
        api.distill(data=tmp_path, mixup="x", progress=None, **settings)
    with pytest.raises(InputError, match=r"^max_drop must be between 0 and 100 points, got 101"):
        api.export(tmp_path, format="onnx", max_drop=101, progress=None)
    with pytest.raises(InputError, match=r"^candidates, budget are for the int8 search: add int8, or leave them out$"):
        api.export(tmp_path, format="onnx", candidates=3, budget=9, progress=None)
    with pytest.raises(InputError, match=r"^stored_k is about the targets that are written: give store_targets=DIR"):
        api.distill(data=tmp_path, stored_k=9, progress=None, **settings)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"mixup": "x"}, "mixup must be a number"), ({"lr": 1e9}, "lr must be between 0 and 1000")]
)
def test_a_traceback_says_what_is_wrong_once(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    with pytest.raises(InputError) as caught:
        api.distill(student="test_resnet", teacher="ema", data=tmp_path, out=tmp_path / "o", progress=None, **wrong)
    assert "".join(traceback.format_exception(caught.value)).count(said) == 1


TRAINED: dict[str, Any] = {"student": "test_resnet", "teacher": "ema", "data": "d", "out": "o"}
WRONG: list[tuple[Callable[..., Any], dict[str, Any], list[tuple[str, Any]]]] = [
    (
        api.export,
        {"student": "r", "format": "onnx"},
        [
            *(("max_drop", "1"), ("max_drop", math.nan), ("min_speedup", "1"), ("min_speedup", math.inf)),
            *(
                ("batch", "x"),
                ("batch", [1]),
                ("batch", True),
                ("batch", 0),
                ("size", "x"),
                ("size", [32]),
                ("opset", 99),
            ),
            *(("head", 5), ("test", 5), ("labels", 5), ("data", ""), ("out", ""), ("input_layout", 5)),
            *(("int8", "no"), ("fp16", "no"), ("uint8_input", "no"), ("candidates", "3"), ("candidates", 0)),
            *(("heal", "5"), ("heal", math.nan), ("heal", math.inf), ("heal", -1.0), ("heal", 1e9), ("heal", 5.0)),
            *(("budget", -1.0), ("calibration_images", "300"), ("calibration_images", 0), ("judging_images", 15)),
        ],
    ),
    (
        api.evaluate,
        {"models": "r"},
        [
            *(("threads", "2"), ("threads", 0), ("batch", "x"), ("test", 3), ("labels", 3), ("cache", 3)),
            *(("lowshot", 5), ("lowshot", "1,x"), ("transfers", "cifar10=x"), ("transfers", ["no=x"])),
        ],
    ),
    (
        api.bench,
        {"bundles": "b"},
        [
            *(
                ("threads", "1"),
                ("threads", 0),
                ("processes", "1"),
                ("processes", 1.5),
                ("retries", "x"),
                ("batch", "2"),
            ),
            *(("affinity", 0), ("affinity", "a"), ("affinity", "3-1"), ("affinity", [-1]), ("affinity", [])),
            *(("data", 3), ("device", 3), ("python", 3), ("provider", "quantum"), ("profile", "slow")),
        ],
    ),
    (api.report, {"folders": "r"}, [("budgets", 30), ("budgets", "30"), ("budgets", ["30ms"]), ("margin", "1")]),
    (
        api.distill,
        TRAINED,
        [
            *(("workers", -1), ("workers", "2"), ("checkpoint_minutes", "x"), ("corrupt_budget", 2), ("keep", True)),
            *(("probe_every", 1.5), ("data", ""), ("out", ""), ("init", 5)),
        ],
    ),
    (api.open, {"folder": "r"}, [("threads", "2"), ("threads", 0), ("provider", 3)]),
    (api.load, {}, [("run", 3), ("run", "")]),
]


@pytest.mark.parametrize(
    ("function", "needed", "name", "value"), [(f, needed, *one) for f, needed, wrong in WRONG for one in wrong]
)
def test_every_function_refuses_wrong_arguments_in_one_line(
    function: Callable[..., Any], needed: dict[str, Any], name: str, value: Any
) -> None:
    with pytest.raises(InputError) as caught:
        function(**needed | {name: value})
    said = str(caught.value)
    assert name.split("_")[0].rstrip("s") in said.replace("low-shot", "lowshot") and "\n" not in said
    assert "does not exist" not in said  # refused before anything was opened


def test_the_api_takes_cores_as_the_command_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from robx.runtime.bench import bench
    from robx.runtime.bench.profiles import BenchSettings

    seen: list[BenchSettings] = []
    monkeypatch.setattr(bench, "bench", lambda settings, **_: seen.append(settings) or [])
    for cores in ("0,2", "4-6", [0, 2], None):
        api.bench("b", affinity=cores)
    assert [one.affinity for one in seen] == [(0, 2), (4, 5, 6), (0, 2), None]

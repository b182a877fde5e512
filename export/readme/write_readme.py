"""README.md of a bundle: what it is, its licences and verdict, what it takes and returns, and code that runs it.

Generated from the manifest alone, so it never says anything else. The examples read the golden sample and write
``my_output.npy`` or ``my_output.bin``, which ``robx check`` compares.
"""

from __future__ import annotations

import math
from typing import Any

import jinja2

from robx.formats import FORMATS, RUNTIMES
from robx.golden.sample import GoldenSample
from robx.images.decode import MAX_ASPECT
from robx.records import Bundle, DataInfo, Preprocessing, TeacherInfo, unfinished


def readme(bundle: Bundle, sample: GoldenSample) -> str:
    """The Markdown of the README of a bundle with this golden sample."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("robx.export.readme", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["text"] = _text
    template = environment.get_template("readme.md.j2")
    return template.render(_view(bundle, sample))


def preprocessing_steps(bundle: Bundle) -> tuple[list[str], list[str]]:
    """The exact steps from an image file to the network: those on the host, and those that the model does itself."""
    inside = bundle.in_model
    host = [
        "Decode to 8-bit RGB. Apply the EXIF rotation, put transparent images on white, scale 16-bit images by "
        "255 / 65535. Of floats and 32-bit integers, white is the smallest of 1 (floats only), 255 and 65535 that the "
        "brightest pixel exceeds by a quarter at most."
    ]
    geometry = _geometry_steps(bundle.student.preprocessing)
    values = _value_steps(bundle.student.preprocessing)
    if inside is None:
        return [*host, *geometry, *values, "Order the axes as N, 3, height, width (NCHW), float32."], []
    order = f"N, {'3, height, width' if inside.layout == 'NCHW' else 'height, width, 3'} ({inside.layout})"
    host += [] if inside.resize else geometry
    host.append(f"Order the channels as {inside.channels} and the axes as {order}, uint8, values 0 to 255.")
    return host, [*(geometry if inside.resize else []), *values]


def _geometry_steps(pre: Preprocessing) -> list[str]:
    height, width = pre.shape
    how = f"antialiased {pre.interpolation} interpolation as in Pillow ({_kernel(pre)})"
    if pre.crop_width is None:
        size = (
            f"so that its shorter side becomes {pre.size} pixels and its longer side "
            f"floor({pre.size} * longer / shorter)"
        )
    else:
        scale = f"max({pre.size} / height, {pre.size * width / height:g} / width)"
        size = f"by the factor {scale}, each side rounded to the nearest whole number (half to even)"
    return [
        f"Of an image more than {MAX_ASPECT} times as long as wide take the square in its centre.",
        f"Resize it {size}, with {how}. Round to whole numbers 0 to 255.",
        f"Crop {width} x {height} pixels (width x height) from the centre: left = round((width - {width}) / 2), "
        f"top = round((height - {height}) / 2), half to even.",
    ]


def _kernel(pre: Preprocessing) -> str:
    support = "the kernel is widened by the reduction factor"
    return f"a = -0.5; {support}" if pre.interpolation == "bicubic" else support


def _value_steps(pre: Preprocessing) -> list[str]:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (pre.mean, pre.std))
    return [
        "Divide by 255.",
        f"Subtract the mean ({mean}) and divide by the standard deviation ({std}), in the order R, G, B.",
    ]


def _view(bundle: Bundle, sample: GoldenSample) -> dict[str, Any]:
    """What the templates show."""
    given, made = bundle.inputs[0], bundle.outputs[0]
    pre, batch = bundle.student.preprocessing, given.shape[0] or 1
    host, inside = preprocessing_steps(bundle)
    height, width = pre.shape
    return {
        "bundle": bundle,
        "student": bundle.student,
        "format": FORMATS[bundle.format].title,
        "runtime": RUNTIMES[bundle.runtime].title or FORMATS[bundle.format].title.partition(" (")[0],
        "install": RUNTIMES[bundle.runtime].device_install,
        "snippets": f"{bundle.runtime}.md.j2",
        "licences": _licences(bundle),
        "judged_on": _judged_on(bundle),
        "interrupted": unfinished(bundle.student),
        "host_steps": host,
        "model_steps": inside,
        "pre": pre,
        "max_aspect": MAX_ASPECT,
        "height": height,
        "width": width,
        "resizes": bundle.in_model is not None and bundle.in_model.resize,
        "given": given,
        "made": made,
        "files": {file.role: file.path for file in bundle.deployed},
        "batch": batch,
        "image_shape": list(sample.inputs.shape[1:]),
        "values": math.prod(sample.inputs.shape[1:]),
        "output_width": made.shape[1] or bundle.student.width,
        "uint8": given.dtype == "uint8",
        "size": f"{bundle.bytes / 1e6:.1f} MB" if bundle.bytes >= 1e5 else f"{bundle.bytes / 1e3:.1f} kB",
        "answered_by": sample.record.answered_by,
        "mistakes": len(sample.record.mistakes),
    }


def _judged_on(bundle: Bundle) -> str:
    """What the verdict was reached on, in words: no more than the manifest says."""
    seen = bundle.calibration
    if seen is None:
        return (
            "The export was given no images, so the accuracy of this model was not judged: its outputs were compared "
            "with PyTorch's on generated images, where this machine could run it."
        )
    if bundle.precision == "fp32":
        return "The accuracy of an fp32 model is not judged: its outputs are compared with those of PyTorch on images."
    if bundle.verdict == "NOT_JUDGED":
        return "This model was not judged: the machine of the export could not run it as its device does."
    return (
        f"The gate compared this model with the float32 student on {seen.judged_images} images that calibration has "
        "not seen. Images of a test split are new to the student as well; without one, a part was set aside, "
        "which the student may have been trained on."
    )


def _licences(bundle: Bundle) -> list[tuple[str, str, str]]:
    """(what, its name, its licence) of everything that the weights were made from."""
    teacher: TeacherInfo | None = bundle.student.teacher
    data: DataInfo | None = bundle.student.data
    found = [("Teacher", teacher.name, teacher.licence)] if teacher else [("Teacher", "none, or not recorded", "-")]
    found.append(("Training images", data.name, data.licence) if data else ("Training images", "not recorded", "-"))
    return [(what, name, licence.strip() or "unknown") for what, name, licence in found]


def _text(value: object) -> str:
    """A foreign text (a name, a reason) on one line, without what Markdown or HTML would act on."""
    line = " ".join(str(value).split())
    for mark in "\\`*_[]|#<>":
        line = line.replace(mark, f"\\{mark}")
    return line

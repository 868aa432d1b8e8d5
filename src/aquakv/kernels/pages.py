"""The page format under the name that kernels use: `aquakv.numerics.pages`, where codecs find it too."""

from aquakv.numerics.pages import (
    FIELD_COLUMNS,
    MAX_WIDTH,
    PAGE_TOKENS,
    PLANE_BYTES,
    TAIL_BYTES,
    Field,
    PageLayout,
    clear_attended,
    level_slopes,
    pack_pages,
    pack_records,
    record_attended,
    record_planes,
    record_scales,
    unpack_pages,
)

__all__ = [
    "FIELD_COLUMNS",
    "MAX_WIDTH",
    "PAGE_TOKENS",
    "PLANE_BYTES",
    "TAIL_BYTES",
    "Field",
    "PageLayout",
    "clear_attended",
    "level_slopes",
    "pack_pages",
    "pack_records",
    "record_attended",
    "record_planes",
    "record_scales",
    "unpack_pages",
]

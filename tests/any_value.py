"""Nodes that give any value, given as JSON, as the switches and plots of other packs do.

Put into custom_nodes of a test server.
"""

import json


class AnyValue:
    RETURN_TYPES = ("*",)
    FUNCTION = "run"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"json": ("STRING", {"default": "null"})}}

    def run(self, json: str) -> tuple:
        return (loads(json),)


class AnyValues(AnyValue):
    OUTPUT_IS_LIST = (True,)


loads = json.loads
NODE_CLASS_MAPPINGS = {"AnyValue": AnyValue, "AnyValues": AnyValues}

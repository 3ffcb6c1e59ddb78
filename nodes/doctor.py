"""The node that looks at this machine."""

import time

from ..host import current as host
from ..messages import log
from .sockets import CATEGORY, Node, found_by, io


class Doctor(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MajicFluxDoctor",
            display_name="MajicFlux doctor",
            category=CATEGORY,
            description="Looks at this machine: versions, the card, memory, the model files, and "
            "what the card can do. Run it alone, and paste its text into a bug report.",
            search_aliases=found_by(
                "diagnose, system info, bug report",
                "诊断, 检查, 系统信息, 麦橘 超然",
            ),
            hidden=[io.Hidden.unique_id],
            outputs=[
                io.String.Output(
                    display_name="report",
                    tooltip="The same text, for other nodes such as Preview as Text.",
                )
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls) -> float:
        return time.time()  # the machine may have changed since

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..lab.doctor import diagnosis

        text = diagnosis()
        log.info("%s", text)
        return io.NodeOutput(text, ui=host.node_text([text]))

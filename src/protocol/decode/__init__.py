# SPDX-License-Identifier: MIT
"""What the entries of a ring say: bytes in, values and text out.

For people who look at a ring, so nothing here refuses: what is malformed is shown as far as it goes, with what is wrong
about it. `decoder_for` knows which decoder a ring needs.
"""

from paravirt.protocol.decode.blkif import BlkifDecoder
from paravirt.protocol.decode.entry import Decoder, Entry, HexDecoder
from paravirt.protocol.decode.messages import MessageDecoder
from paravirt.protocol.decode.netctrl import NetifCtrlDecoder
from paravirt.protocol.decode.netif import NetifRxDecoder, NetifTxDecoder
from paravirt.protocol.layout import MessagePair

__all__ = ["BlkifDecoder", "Decoder", "Entry", "HexDecoder", "MessageDecoder", "decoder_for"]

_KNOWN: dict[str, type[Decoder]] = {
    "vbd": BlkifDecoder,
    "blkif": BlkifDecoder,
    "netif-tx": NetifTxDecoder,
    "netif-rx": NetifRxDecoder,
    "netif-ctrl": NetifCtrlDecoder,
}


def decoder_for(protocol: str, messages: MessagePair | None = None) -> Decoder:
    """Of the protocol that a ring names, else by the layout of its messages, else as hexadecimal numbers.

    Each direction of a ring wants its own decoder, because some entries say what the next one is.
    """
    known = _KNOWN.get(protocol)
    if known is not None:
        return known()
    return HexDecoder() if messages is None else MessageDecoder(messages)

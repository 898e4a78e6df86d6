"""Everything that the world can do to us, as one tree.

    ShoalError                      one line for the user: what was met, what is allowed, what to do
      ModelError                    about a model file
        BadModelFile                truncated, corrupt or not GGUF
        UnsupportedModel            a sound file that we cannot run: architecture, quantisation, tokenizer
        ModelNotFound               no such file, name or hash on a device
      InfeasiblePlacement           the devices together cannot hold the model
      RequestError                  the request cannot be answered as it stands
        ContextExceeded             prompt and answer are longer than the context
        TemplateError               the model's chat template refuses these messages
      DamagedFile                   a file of ours does not hold what was written to it
      CannotWrite                   a file cannot be written: no room, no such folder, no permission
      DeviceError                   about a device
        DeviceUnreachable           no connection, or it was lost
        DeviceRefused               it answered, and the answer was no
        WorkerLost                  a worker process ended in the middle of its work
      LinkError                     about one connection
        LocalProtocolError          we were about to send what the protocol forbids
        RemoteProtocolError         the peer sent what the protocol forbids
        LinkClosed                  the peer closed the connection
        PeerNotTrusted              who is at the other end is no member, or does not take us for one
        AddressInUse                another program listens there
      LabError                      about a cluster played on this machine
        LabUnavailable              this machine lacks what playing one takes

A caller's bad argument is a ValueError, our own broken invariant an AssertionError; neither belongs here.
"""

from __future__ import annotations


class ShoalError(Exception):
    """Base of the tree. `str(error)` is one line that a user can act on."""


class ModelError(ShoalError):
    """Something about a model file."""


class BadModelFile(ModelError):
    """The file is truncated, corrupt, or not GGUF at all."""


class UnsupportedModel(ModelError):
    """The file is sound, but its architecture, quantisation or tokenizer is not one we run."""


class ModelNotFound(ModelError):
    """No file of that path, name or content hash on a device."""


class InfeasiblePlacement(ShoalError):
    """The devices together cannot hold the model; the text names the missing bytes and what would help."""


class RequestError(ShoalError):
    """The request cannot be answered as it stands."""


class ContextExceeded(RequestError):
    """Prompt and answer together are longer than the context."""


class TemplateError(RequestError):
    """The model's chat template refuses these messages."""


class DamagedFile(ShoalError):
    """What this device stored is not what it wrote."""


class CannotWrite(ShoalError):
    """A file cannot be written: no room, no such folder, no permission, or one that must not be replaced."""


class DeviceError(ShoalError):
    """Something about a device."""


class DeviceUnreachable(DeviceError):
    """No connection to the device, or it was lost."""


class DeviceRefused(DeviceError):
    """The device answered, and the answer was no."""


class WorkerLost(DeviceError):
    """A worker process ended in the middle of its work."""


class LinkError(ShoalError):
    """Something about one connection."""


class LocalProtocolError(LinkError):
    """We were about to send what the protocol forbids."""


class RemoteProtocolError(LinkError):
    """The peer sent what the protocol forbids."""


class LinkClosed(LinkError):
    """The peer closed the connection."""


class PeerNotTrusted(LinkError):
    """Who is at the other end is no member of the cluster, or does not take this device for one."""


class AddressInUse(LinkError):
    """Another program listens on that address."""


class LabError(ShoalError):
    """Something about a cluster that is played on this machine."""


class LabUnavailable(LabError):
    """This machine lacks what playing a cluster takes: Linux, root, namespaces, control groups."""

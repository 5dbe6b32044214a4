from __future__ import annotations
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
import numpy as np
from numpy.typing import NDArray
class Resident(Protocol):
    def host(self) -> NDArray[Any]: ...
Held = NDArray[Any] | Resident
class OnHost:
    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
    def __set__(self, instance: object, value: Held) -> None:
        instance.__dict__[self._name] = value
    def __get__(self, instance: object, owner: type | None = None) -> NDArray[np.float32]:
        if instance is None:
            raise AttributeError(self._name)
        value = instance.__dict__[self._name]
        return value if isinstance(value, np.ndarray) else value.host()
@dataclass(frozen=True, eq=False)
class Step:
    logits: int
    theta: OnHost = OnHost()
    state: int
    origin: object = field(default=None, repr=False)
class R:
    def host(self) -> NDArray[Any]: return np.ones(2)
def f(s: Step) -> NDArray[np.float32]:
    return s.theta
s=Step(1,np.zeros(2),3); s2=Step(1,R(),3)
print(f(s),f(s2),replace(s2,theta=np.zeros(1)).theta, s2)

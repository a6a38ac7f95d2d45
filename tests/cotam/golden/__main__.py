"""Write the golden bitstreams of the packaged codec anew; to be done when its weights change, and only then."""

from cotam.codec import Codec
from tests.cotam.golden import write

write(Codec.load())

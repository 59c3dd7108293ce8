"""What tests, `mlakit check` and the bench share: tolerances, random inputs, poison."""

from mlakit.testing.e4m3 import eager_e4m3_lse as eager_e4m3_lse
from mlakit.testing.inputs import PagedCache as PagedCache
from mlakit.testing.inputs import PageTable as PageTable
from mlakit.testing.inputs import random_page_table as random_page_table
from mlakit.testing.inputs import random_paged_cache as random_paged_cache
from mlakit.testing.inputs import random_pages as random_pages
from mlakit.testing.poison import count_poison as count_poison
from mlakit.testing.poison import poison_ as poison_
from mlakit.testing.tolerances import Comparison as Comparison
from mlakit.testing.tolerances import assert_close as assert_close
from mlakit.testing.tolerances import compare as compare
from mlakit.testing.tolerances import compare_lse as compare_lse

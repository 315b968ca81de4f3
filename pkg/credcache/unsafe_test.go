// SPDX-License-Identifier: Apache-2.0

package credcache

import "unsafe"

// unsafeString is a string that changes with the buffer, as fasthttp's do.
func unsafeString(b []byte) string { return unsafe.String(unsafe.SliceData(b), len(b)) }

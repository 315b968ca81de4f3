// SPDX-License-Identifier: Apache-2.0

package association

const crashDirEnv = "LATCHKEY_CRASH_DIR"

func crashChild(string) {}

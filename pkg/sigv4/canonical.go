// SPDX-License-Identifier: Apache-2.0

package sigv4

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// canonicalHead is the method and the path, with what ends each.
func canonicalHead(r *http.Request) string {
	// Paths that are signed as they are sent: already escaped, and escaped once
	// more here ("%2F" becomes "%252F"). Taken from the request line, because a
	// decoded and encoded again path may be spelled otherwise.
	path := r.RequestURI
	if strings.HasPrefix(path, "/") {
		path, _, _ = strings.Cut(path, "?")
	} else {
		path = r.URL.EscapedPath()
	}
	if path == "" {
		path = "/"
	}
	var b strings.Builder
	b.Grow(len(r.Method) + len(path) + len(path)/2 + 2)
	b.WriteString(r.Method)
	b.WriteByte('\n')
	escape(&b, path, true)
	b.WriteByte('\n')
	return b.String()
}

// canonicalTail is the headers, their list and the hash of the body.
func canonicalTail(r *http.Request, a authorization, body [sha256.Size]byte) string {
	var b strings.Builder
	b.Grow(1024)
	for _, name := range a.signedHeaders {
		b.WriteString(name)
		b.WriteByte(':')
		values := r.Header[http.CanonicalHeaderKey(name)]
		switch {
		case name == "host":
			collapse(&b, r.Host)
		case name == "content-length" && len(values) == 0 && r.ContentLength >= 0:
			// Left out of the map by some servers.
			b.WriteString(strconv.FormatInt(r.ContentLength, 10))
		}
		if name != "host" {
			for i, v := range values {
				if i > 0 {
					b.WriteByte(',')
				}
				collapse(&b, v)
			}
		}
		b.WriteByte('\n')
	}
	b.WriteByte('\n')
	b.WriteString(a.list)
	b.WriteByte('\n')
	b.WriteString(hex.EncodeToString(body[:]))
	return b.String()
}

// collapse writes a header's value without the spaces around it, and with one
// where there are several in a row.
func collapse(b *strings.Builder, v string) {
	v = strings.Trim(v, " \t")
	if !strings.Contains(v, "  ") {
		b.WriteString(v)
		return
	}
	space := false
	for i := range len(v) {
		if v[i] == ' ' && space {
			continue
		}
		space = v[i] == ' '
		b.WriteByte(v[i])
	}
}

// param is one parameter of a query, decoded and encoded again.
type param struct{ name, value, encodedName, encodedValue string }

// parseQuery reads a query as url.ParseQuery does, so that what is verified is
// what is used, but refuses what that would leave out.
func parseQuery(raw string) ([]param, error) {
	if raw == "" {
		return nil, nil
	}
	var out []param
	for part := range strings.SplitSeq(raw, "&") {
		if part == "" {
			continue
		}
		if strings.Contains(part, ";") {
			return nil, refuse(ErrIncomplete, "The query string has a semicolon that is not escaped.")
		}
		name, value, _ := strings.Cut(part, "=")
		n, err := url.QueryUnescape(name)
		if err != nil {
			return nil, refuse(ErrIncomplete, "The query string has an invalid escape.")
		}
		v, err := url.QueryUnescape(value)
		if err != nil {
			return nil, refuse(ErrIncomplete, "The query string has an invalid escape.")
		}
		out = append(out, param{n, v, escaped(n), escaped(v)})
	}
	return out, nil
}

// Orders of parameters.
func byEncoded(a, b param) int {
	return cmp.Or(cmp.Compare(a.encodedName, b.encodedName), cmp.Compare(a.encodedValue, b.encodedValue))
}

func byPlain(a, b param) int {
	return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.value, b.value))
}

func canonicalQuery(params []param, order func(a, b param) int) string {
	if len(params) == 0 {
		return ""
	}
	params = slices.Clone(params)
	slices.SortFunc(params, order)
	var b strings.Builder
	for i, p := range params {
		if i > 0 {
			b.WriteByte('&')
		}
		b.WriteString(p.encodedName)
		b.WriteByte('=')
		b.WriteString(p.encodedValue)
	}
	return b.String()
}

// presigned tells whether a query holds a signature, or a part of one.
func presigned(raw string) bool {
	if raw == "" {
		return false
	}
	for part := range strings.SplitSeq(raw, "&") {
		name, _, _ := strings.Cut(part, "=")
		if n, err := url.QueryUnescape(name); err == nil {
			name = n
		}
		if len(name) >= 6 && strings.EqualFold(name[:6], "x-amz-") {
			return true
		}
	}
	return false
}

func escaped(s string) string {
	var b strings.Builder
	escape(&b, s, false)
	return b.String()
}

// escape writes s with everything escaped but RFC 3986's unreserved characters
// and, in a path, the slash.
func escape(b *strings.Builder, s string, path bool) {
	const digits = "0123456789ABCDEF"
	for i := range len(s) {
		c := s[i]
		switch {
		case c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z', c >= '0' && c <= '9',
			c == '-', c == '_', c == '.', c == '~', path && c == '/':
			b.WriteByte(c)
		default:
			b.WriteByte('%')
			b.WriteByte(digits[c>>4])
			b.WriteByte(digits[c&15])
		}
	}
}

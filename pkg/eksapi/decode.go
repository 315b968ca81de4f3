// SPDX-License-Identifier: Apache-2.0

package eksapi

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"unicode/utf8"
)

// maxDepth is how deep a body may nest; what is known nests two deep.
const maxDepth = 32

// readBody reads the body as far as its operation allows. release must be called
// when the caller is known, or refused.
func (c *call) readBody() (release func(), err error) {
	release = func() {}
	most := c.route.op.maxBody
	if c.r.ContentLength > most {
		// It is not read, so the connection cannot go on.
		c.w.Header().Set("Connection", "close")
		return release, c.invalidRequest(fmt.Sprintf("The request body is larger than %d bytes.", most))
	}
	if c.r.Body == nil || c.r.ContentLength == 0 {
		return release, nil
	}
	var buf bytes.Buffer
	if c.r.ContentLength > 0 {
		buf.Grow(int(min(c.r.ContentLength, freeBody)) + bytes.MinRead)
	}
	body := http.MaxBytesReader(c.w, c.r.Body, most)
	_, err = buf.ReadFrom(io.LimitReader(body, freeBody))
	if err == nil && buf.Len() == freeBody && c.r.ContentLength != freeBody {
		take, ok := c.bodies.take(c.r.RemoteAddr)
		if !ok {
			c.w.Header().Set("Connection", "close")
			return release, &fault{status: http.StatusServiceUnavailable, code: unavailable, message: "Too many large requests, try again."}
		}
		release = take
		_, err = buf.ReadFrom(body)
	}
	if err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return release, c.invalidRequest(fmt.Sprintf("The request body is larger than %d bytes.", most))
		}
		return release, c.invalidRequest("The request body could not be read.")
	}
	c.body = buf.Bytes()
	return release, nil
}

// member is one of a body that is known, and where it goes: *string, **string,
// *bool, **bool or *map[string]string.
type member struct {
	name string
	into any
}

// decode reads a body. Members that are not known are ignored, null is as if
// absent. Names are exact: encoding/json alone would take "ROLEARN" as well. A
// known member that is there twice is refused: readers would differ about which
// counts.
func (c *call) decode(members ...member) error {
	if !utf8.Valid(c.body) {
		return c.invalidParameter("The request body is not valid UTF-8.")
	}
	if deep(c.body) {
		return c.invalidParameter("The request body is nested too deeply.")
	}
	seen := 0 // one bit for each member
	err := eachMember(c.body, func(name string, raw json.RawMessage) error {
		for i, m := range members {
			if m.name != name {
				continue
			}
			if seen&(1<<i) != 0 {
				return fmt.Errorf("member %s is there more than once", name)
			}
			seen |= 1 << i
			return assign(m, raw)
		}
		return nil
	})
	if err != nil {
		return c.invalidParameter("The request is invalid: " + err.Error() + ".")
	}
	return nil
}

var errSyntax = errors.New("the body is not a JSON object")

// eachMember goes through one JSON object.
func eachMember(b []byte, do func(string, json.RawMessage) error) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return errSyntax
	}
	for dec.More() {
		t, err := dec.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return errSyntax
		}
		var raw json.RawMessage
		if err := dec.Decode(&raw); err != nil {
			return errSyntax
		}
		if err := do(name, raw); err != nil {
			return err
		}
	}
	if t, err := dec.Token(); err != nil || t != json.Delim('}') {
		return errSyntax
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errSyntax
	}
	return nil
}

func assign(m member, raw json.RawMessage) error {
	if string(raw) == "null" {
		return nil
	}
	switch into := m.into.(type) {
	case *string:
		text, err := toString(raw)
		if err != nil {
			return fmt.Errorf("member %s must be a string", m.name)
		}
		*into = text
	case **string:
		text, err := toString(raw)
		if err != nil {
			return fmt.Errorf("member %s must be a string", m.name)
		}
		*into = &text
	case *bool:
		if json.Unmarshal(raw, into) != nil {
			return fmt.Errorf("member %s must be a boolean", m.name)
		}
	case **bool:
		if json.Unmarshal(raw, into) != nil {
			return fmt.Errorf("member %s must be a boolean", m.name)
		}
	case *map[string]string:
		tags := map[string]string{}
		err := eachMember(raw, func(key string, value json.RawMessage) error {
			if _, ok := tags[key]; ok {
				return fmt.Errorf("member %s has a key more than once", m.name)
			}
			var text *string
			if json.Unmarshal(value, &text) != nil || text == nil {
				return fmt.Errorf("the values of member %s must be strings", m.name)
			}
			tags[key] = *text
			return nil
		})
		if errors.Is(err, errSyntax) {
			return fmt.Errorf("member %s must be a map of strings", m.name)
		}
		if err != nil {
			return err
		}
		*into = tags
	default:
		return fmt.Errorf("member %s cannot be read", m.name)
	}
	return nil
}

// toString reads a JSON string. Most have no escapes: what is between the
// quotes is the text, as the syntax and the encoding have been checked.
func toString(raw json.RawMessage) (string, error) {
	if len(raw) >= 2 && raw[0] == '"' && bytes.IndexByte(raw, '\\') < 0 {
		return string(raw[1 : len(raw)-1]), nil
	}
	var text string
	err := json.Unmarshal(raw, &text)
	return text, err
}

// deep tells whether brackets nest deeper than maxDepth, without recursion.
func deep(b []byte) bool {
	depth, text := 0, false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case text && c == '\\':
			i++
		case c == '"':
			text = !text
		case text:
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

// one returns a parameter of the query that may be there once.
func (c *call) one(query url.Values, name string) (string, bool, error) {
	switch values := query[name]; len(values) {
	case 0:
		return "", false, nil
	case 1:
		return values[0], true, nil
	}
	return "", false, c.invalidParameter("Parameter " + name + " is there more than once.")
}

import { afterEach, beforeEach, expect, test } from 'vitest'
import { h } from '../src/dom'
import { makeHost, Mounts } from '../src/mount'

let mounts: Mounts
let found: string[]
let covered: string[]
let host: HTMLElement
let scroller: HTMLElement
let button: HTMLElement

const settled = () => new Promise(resolve => setTimeout(resolve, 2))

function place(): HTMLElement {
  const element = h('div', { 'data-llm-magic': 'key/a' }, h('div', {}, 'static'))
  document.body.append(element)
  return element
}

/** A browser forgets where an element was scrolled to when it is taken out; jsdom does not. */
function take(element: HTMLElement, scrolled = scroller): void {
  element.remove()
  scrolled.scrollTop = scrolled.scrollLeft = 0
}

function scrollTo(top: number, left = 0): void {
  scroller.scrollTop = top
  scroller.scrollLeft = left
  scroller.dispatchEvent(new Event('scroll'))
}

beforeEach(() => {
  found = []
  covered = []
  mounts = new Mounts('key', { found: view => found.push(view), covered: view => covered.push(view) })
  const made = makeHost()
  host = made.host
  scroller = h('div', { 'data-scrolls': true })
  Object.defineProperty(scroller, 'scrollHeight', { configurable: true, get: () => 900 })
  button = h('button', {}, 'press')
  made.root.append(scroller, button)
})

afterEach(() => {
  mounts.dispose()
  document.body.replaceChildren()
})

test('where a view was scrolled to is kept when its output is drawn anew', async () => {
  const first = place()
  mounts.add('a', host)
  scrollTo(120, 30)
  take(first)
  await settled()
  place()
  await settled()
  expect([scroller.scrollTop, scroller.scrollLeft]).toEqual([120, 30])
})

test('also when the old place goes after the new one came, and when the same place comes back', async () => {
  const first = place()
  mounts.add('a', host)
  scrollTo(120)
  const second = place()
  await settled()
  take(first)
  await settled()
  expect(second.contains(host)).toBe(true)
  expect(scroller.scrollTop).toBe(120)
  take(second)
  document.body.append(second)
  await settled()
  expect(scroller.scrollTop).toBe(120)
})

test('what stays at its end is at its end again', async () => {
  const first = place()
  mounts.add('a', host)
  scroller.dataset['scrolls'] = 'end'
  scrollTo(300)
  take(first)
  place()
  await settled()
  expect(scroller.scrollTop).toBe(900)
})

test('a scroll that is heard of while the place is away is none', async () => {
  const first = place()
  mounts.add('a', host)
  scrollTo(120)
  take(first)
  scroller.dispatchEvent(new Event('scroll'))
  place()
  await settled()
  expect(scroller.scrollTop).toBe(120)
})

test.each([false, true])('the focus comes back with the view (a browser that tells of it: %s)', async tells => {
  const first = place()
  mounts.add('a', host)
  button.focus()
  if (tells) button.dispatchEvent(new FocusEvent('focusout', { bubbles: true, composed: true }))
  take(first)
  await settled()
  expect(host.shadowRoot?.activeElement).toBeNull()
  place()
  await settled()
  expect(host.shadowRoot?.activeElement).toBe(button)
})

test('the focus is not taken from where the reader went', async () => {
  const other = h('button', {}, 'other')
  document.body.append(other)
  const first = place()
  mounts.add('a', host)
  button.focus()
  button.blur()
  await settled()
  take(first)
  const second = place()
  await settled()
  expect(document.activeElement).toBe(document.body)
  button.focus()
  take(second)
  other.focus()
  place()
  await settled()
  expect(document.activeElement).toBe(other)
})

test('a view that is in the page is told of, the first time and again', async () => {
  mounts.add('a', host)
  expect(covered).toEqual([])
  const first = place()
  await settled()
  expect(covered).toEqual(['a'])
  document.body.append(place())
  await settled()
  expect(covered).toEqual(['a'])
  take(first)
  await settled()
  expect(covered).toEqual(['a', 'a'])
})

test('a place that is there already is found', () => {
  place()
  mounts.dispose()
  found = []
  mounts = new Mounts('key', { found: view => found.push(view), covered: () => undefined })
  expect(found).toEqual(['a'])
})

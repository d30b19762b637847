/** The placement to take elsewhere: as Python, as a command, as JSON, and what the backend calls it. */

import { copyText } from '../../clipboard'
import { activeIn, h, replace, setText } from '../../dom'
import type { Translate, Word } from '../../i18n'
import type { ExportState } from '../../wire'
import { setAttribute } from '../map/cells'

const KINDS: [keyof ExportState, Word][] = [
  ['python', 'editCopyPython'],
  ['command', 'editCopyCommand'],
  ['json', 'editCopyJson'],
  ['llama_cpp', 'editCopyLlamaCpp'],
  ['backend', 'editCopyBackend'],
]

export interface Copy {
  /** The button with its menu. */
  element: HTMLElement
  /** Where a text is shown that could not be copied, and what the backend is told. */
  place: HTMLElement
  show: (exports: ExportState, isEnabled: boolean) => void
}

export function makeCopy(t: Translate): Copy {
  const button = h('button', { type: 'button', 'aria-haspopup': 'menu', 'aria-expanded': 'false' }) as HTMLButtonElement
  const menu = h('div', { class: 'menu', role: 'menu', 'aria-label': t('copy'), hidden: true })
  const fallback = h('div', {})
  const flags = h('div', {})
  const element = h('div', { class: 'copy' }, button, menu)
  let exports: ExportState = { python: '', command: '', json: '', llama_cpp: '', backend: '' }

  const label = (word: Word) => setText(button, word === 'copied' ? `✓ ${t(word)}` : `${t(word)} ▾`)
  const open = (isOpen: boolean) => {
    menu.hidden = !isOpen
    setAttribute(button, 'aria-expanded', String(isOpen))
    if (!isOpen) return
    label('copy')
    const items = KINDS.filter(([kind]) => exports[kind])
    replace(menu, ...items.map(([kind, word]) => {
      const attributes = { type: 'button', role: 'menuitem', tabindex: '-1', onclick: () => void choose(kind) }
      return h('button', attributes, t(word))
    }))
    focusItem(menu, 0)
  }
  const choose = async (kind: keyof ExportState) => {
    const text = exports[kind]
    open(false)
    button.focus()
    replace(fallback)
    if (await copyText(text)) label('copied')
    else showText(t, fallback, text)
  }
  label('copy')
  button.addEventListener('click', () => open(Boolean(menu.hidden)))
  element.addEventListener('keydown', event => {
    if (menuKey(event, menu, button)) {
      event.preventDefault()
      event.stopPropagation()
      if (event.key === 'Escape') {
        open(false)
        button.focus()
      }
    }
  })
  element.addEventListener('focusout', event => {
    if (!(event.relatedTarget instanceof Node && element.contains(event.relatedTarget))) open(false)
  })
  return {
    element,
    place: h('div', { class: 'contents' }, flags, fallback),
    show(now, isEnabled) {
      exports = now
      button.disabled = !isEnabled
      const text = now.backend ? [h('span', { class: 'muted' }, `${t('editBackend')} `), h('code', {}, now.backend)] : []
      if (flags.lastChild?.textContent !== (now.backend || undefined)) replace(flags, ...text)
      if (!isEnabled) replace(fallback)
    },
  }
}

function showText(t: Translate, place: HTMLElement, text: string): void {
  const rows = Math.min(12, text.split('\n').length)
  const area = h('textarea', { readonly: true, rows, 'aria-label': t('copyFailed') }) as HTMLTextAreaElement
  area.value = text
  replace(place, h('p', { class: 'note care' }, t('copyFailed')), area)
  area.focus()
  area.select()
}

/** Arrows in an open menu; whether the key was the menu's. */
function menuKey(event: KeyboardEvent, menu: HTMLElement, button: HTMLElement): boolean {
  if (menu.hidden) {
    if (event.key === 'ArrowDown') button.click()
    return event.key === 'ArrowDown'
  }
  const items = [...menu.children]
  const active = activeIn(menu)
  const at = items.findIndex(item => item === active)
  const index = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key]
  if (index !== undefined) focusItem(menu, (index + items.length) % items.length)
  return index !== undefined || event.key === 'Escape'
}

function focusItem(menu: HTMLElement, index: number): void {
  const item = menu.children[index]
  if (item instanceof HTMLElement) item.focus()
}

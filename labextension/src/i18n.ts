/** Every string that a view shows, in every language there is. A test holds that none lacks one. */

import { machineWords } from './words/machine'
import { mapWords } from './words/map'
import { answerWords } from './words/answer'
import { commonWords } from './words/common'

export const LANGUAGES = ['en', 'ja'] as const
export type Language = (typeof LANGUAGES)[number]
/** One message in every language; `{name}` stands for a value. */
export type Message = Record<Language, string>

export const WORDS = { ...commonWords, ...mapWords, ...machineWords, ...answerWords }
export type Word = keyof typeof WORDS
export type Translate = (word: Word, values?: Record<string, string | number>) => string

/** The page's language where it says one that we have, else the browser's, else English. */
export function pageLanguage(): Language {
  const wanted = [document.documentElement.lang, ...navigator.languages]
  for (const tag of wanted) {
    const found = LANGUAGES.find(language => tag.toLowerCase().split(/[-_]/)[0] === language)
    if (found) return found
  }
  return 'en'
}

/** `t('lacks', {size: '1.0 GiB'})` in a language. */
export function translator(language: Language): Translate {
  return (word, values = {}) =>
    WORDS[word][language].replace(/\{(\w+)\}/g, (hole, name: string) => String(values[name] ?? hole))
}
